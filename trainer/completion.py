"""Batched generation of plain continuations, with random numbers that do not depend on how rows are batched."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens that a cache has room for, after the last one, when it grows.
_ROOM = 64
# Rows that have ended are dropped once they are this part of the batch: dropping copies the whole cache, which costs as much
# as a step of several rows.
_ENDED_PART = 1 / 8


@torch.inference_mode()
def complete(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[str] | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts. Rows that have ended leave the batch, several at once, so that the rest gets faster.

    Args:
        target: The model that writes.
        prompts: Token ids of each prompt, at least one each.
        temperatures: For each prompt 0 for greedy decoding, or the temperature to sample at.
        max_new_tokens: Longest answer.
        end_ids: Tokens that end an answer.
        seeds: For each prompt what its draws follow from, whatever else is in the batch; by default its place in it.

    Returns:
        New token ids of each prompt, the end token included.

    Raises:
        ValueError: If the target does not keep what it has read in a cache of transformers, or gives NaN or infinity.
    """
    device = target.get_input_embeddings().weight.device
    input_ids, attention_mask, position_ids = _pad_left(prompts, device)
    temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)
    draws = [random.Random(seed) for seed in (seeds or map(str, range(len(prompts))))]
    kwargs = {"past_key_values": (cache := _make_cache(target)), "use_cache": True}
    if target._supports_logits_to_keep():
        kwargs["logits_to_keep"] = 1
    answers: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(len(prompts))), set[int]()
    for _ in range(max_new_tokens):
        outputs = target(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        _check_cache(target, outputs)
        logits = outputs.logits[:, -1].float()
        _check_finite(logits, [row not in ended for row in rows], target)
        uniform = torch.tensor([draws[row].random() for row in rows], dtype=torch.float32, device=device)
        tokens = _next_tokens(logits, temperature, uniform)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in ended:
                answers[row].append(token)
                if token in end_ids:
                    ended.add(row)
        going = [i for i, row in enumerate(rows) if row not in ended]
        if not going:
            break
        if len(rows) - len(going) >= _ENDED_PART * len(rows):
            kept = torch.tensor(going, device=device)
            # Made for beams, this is the one selection of rows that the cache layers of all architectures know.
            cache.reorder_cache(kept)
            rows = [rows[i] for i in going]
            tokens, temperature = tokens[kept], temperature[kept]
            attention_mask, position_ids = attention_mask[kept], position_ids[kept]
        input_ids = tokens[:, None]
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
    return answers


def _pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions of prompts, each (batch_size, longest)."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return input_ids, attention_mask, (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


class GrowingLayer(DynamicLayer):
    """A cache layer that grows by many tokens at once, where [`DynamicLayer`] copies all it holds at each token.

    Its keys and values are views, without the room after them, so that models and the methods of [`DynamicLayer`] see what
    they know. Whatever puts other tensors in their place, as a selection of rows does, makes it grow anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values.

        Args:
            key_states: (batch_size, num_heads, num_new_tokens, head_dim).
            value_states: The same; the last dimension may be another.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            All keys and values.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._has_room(end):
            self._rooms = _with_room(self.keys, key_states, end), _with_room(self.values, value_states, end)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values

    def _has_room(self, end: int) -> bool:
        if self._rooms is None or any(room.shape[-2] < end for room in self._rooms):
            return False
        held = (self.keys, self.values)
        return all(t.data_ptr() == room.data_ptr() for t, room in zip(held, self._rooms, strict=True))


def _with_room(held: torch.Tensor, states: torch.Tensor, end: int) -> torch.Tensor:
    """A tensor that begins with what is held, and has room for more than what shall be put in until `end`."""
    room = states.new_empty(*states.shape[:-2], end + _ROOM, states.shape[-1])
    if held.numel():
        room[..., : held.shape[-2], :] = held
    return room


def _make_cache(target: PreTrainedModel) -> DynamicCache:
    """The cache that `generate` would make, with full attention's layers as [`GrowingLayer`] and all others as they are."""
    cache = DynamicCache(config=target.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _check_cache(target: PreTrainedModel, outputs: object) -> None:
    # A target that takes another kind of cache ignores ours, and would read nothing but the last token.
    if getattr(outputs, "past_key_values", None) is None:
        raise ValueError(
            f"expected a target that keeps keys and values in `past_key_values`, got {type(target).__name__}, which does "
            "not; FSPAD decodes plainly with such a target, so a head for it would be of no use."
        )


def _check_finite(logits: torch.Tensor, counts: list[bool], target: PreTrainedModel) -> None:
    # Those of banned tokens may be -inf, so that the largest one tells; it is NaN if any is.
    largest = logits.amax(dim=-1).tolist()
    if all(math.isfinite(logit) or not is_counted for logit, is_counted in zip(largest, counts, strict=True)):
        return
    advice = "check the target's weights (does it write sensible text?)"
    if target.dtype == torch.float16:
        advice = "float16 overflows above 65504: load the target in bfloat16 or float32"
    raise ValueError(
        f"expected finite logits from {type(target).__name__} in {str(target.dtype).removeprefix('torch.')}, got NaN or "
        f"infinity; {advice}."
    )


def _next_tokens(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row: the most probable where the temperature is 0, else the one that a number in [0, 1) picks."""
    tokens = logits.argmax(dim=-1)
    hot = temperature > 0
    if hot.any():
        cumulative = (logits[hot] / temperature[hot, None]).softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Rounding must not lift the number to the total, where no token is left to pick.
        number = torch.minimum(uniform[hot, None] * total, total.nextafter(torch.zeros_like(total)))
        tokens[hot] = torch.searchsorted(cumulative, number, right=True)[:, 0]
    return tokens


def find_end_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the tokens that end an answer.

    Args:
        target: The model that writes.
        tokenizer: Its tokenizer.

    Returns:
        Those of the generation config, which knows of end-of-turn tokens, else that of the tokenizer, if it has one.
    """
    ids = target.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
