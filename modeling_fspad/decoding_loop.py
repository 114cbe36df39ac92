"""The loop of assisted decoding: prefill, then draft and verify until plain decoding would stop."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .drafting import Drafter
from .target import FeatureTap, embed_tokens
from .timing import Stopwatch
from .tree import DraftTree
from .tree_attention import (
    VerificationMode,
    attentions_of_path,
    check_rollback,
    hidden_states_of_path,
    keep_accepted,
    learned_positions,
    max_draft_depth,
    stop_recording,
    tree_attention_mask,
)
from .verification import TokenChooser, accept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DecodingLoop:
    """One call of assisted decoding. All state of the call lives here and goes with it.

    Args:
        target: The model whose `generate` was called.
        drafter: Drafts trees, or chains for targets that cannot verify trees.
        chooser: Chooses tokens as plain decoding does.
        mode: How drafts are verified: `TREE` or `CHAIN`.
        generation_config: The options of `generate`.
        model_kwargs: The model inputs that `generate` prepared, with a cache.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter,
        chooser: TokenChooser,
        mode: VerificationMode,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.target = target
        self.drafter = drafter
        self.chooser = chooser
        self.mode = mode
        self.generation_config = generation_config
        self.model_kwargs = dict(model_kwargs)
        self.num_padding = 0
        self.table_length = learned_positions(target)
        self.accept_lengths: list[int] = []
        self.hidden_states: tuple = ()
        self.attentions: tuple = ()
        self.draft_watch, self.verify_watch = Stopwatch(target.device), Stopwatch(target.device)

    @property
    def cache(self) -> Cache:
        """The target's cache."""
        return self.model_kwargs["past_key_values"]

    def run(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Decode until plain decoding would stop.

        Args:
            input_ids: The prompt, of shape `(1, length)`.

        Returns:
            Prompt and new tokens, of shape `(1, total length)`.
        """
        if "logits_to_keep" in self.model_kwargs:
            self.model_kwargs["logits_to_keep"] = 0  # all rows, of which the tap passes on those that are needed
        try:
            with FeatureTap(self.target) as tap:
                input_ids, is_done = self._prefill(tap, input_ids)
                while not is_done:
                    input_ids, is_done = self._step(tap, input_ids)
        finally:
            stop_recording(self.cache)
        return input_ids

    def _prefill(self, tap: FeatureTap, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Run the target on the prompt, choose the first token, and show the features to the head."""
        past_length = self.cache.get_seq_length()
        inputs_embeds = self.model_kwargs.get("inputs_embeds")
        with tap.record(logits_to_keep=1) as recorded:
            outputs = self.target._prefill(input_ids, self.generation_config, self.model_kwargs)
        features = torch.cat(recorded, dim=1)  # (1, new length, hidden), chunks joined
        self._record(outputs)
        self._advance(outputs, num_new_tokens=1)
        check_rollback(self.cache)
        self.cache.activate_past_recording()
        input_ids, is_done = self.chooser.choose(input_ids, outputs.logits[:, -1])
        if not is_done:
            with self.draft_watch.running():
                self._show_prompt(features, input_ids, inputs_embeds, past_length)
        return input_ids, is_done

    def _show_prompt(
        self,
        features: torch.Tensor,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None,
        past_length: int,
    ) -> None:
        length = features.shape[1]
        if inputs_embeds is not None:
            first_token = embed_tokens(self.target, input_ids[:, -1:])
            next_embeds = torch.cat([inputs_embeds[:, inputs_embeds.shape[1] - length + 1 :], first_token], dim=1)
        else:
            next_embeds = embed_tokens(self.target, input_ids[:, -length:])
        positions = torch.arange(past_length, past_length + length, device=input_ids.device)[None]
        padding_mask = self.model_kwargs.get("attention_mask")
        if padding_mask is not None:
            padding_mask = padding_mask[:, : past_length + length]
            positions = (padding_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:]
            padding_mask = padding_mask[:, past_length:]
        self.drafter.extend(features, next_embeds, positions, padding_mask)
        self.num_padding = past_length + length - 1 - int(positions[0, -1])

    def _step(self, tap: FeatureTap, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Draft a tree, verify it, and emit what the target accepts."""
        with self.draft_watch.running():
            tree = self.drafter.draft(input_ids[:, -1:], self._useful_depth(input_ids))
        path: list[int] = []
        with self.verify_watch.running():
            with tap.record() as recorded:
                outputs = self._verify(tree, input_ids)
            try:
                input_ids, is_done = accept(tree, outputs.logits, input_ids, self.chooser, path)
            finally:
                # Whatever is raised on the way, a cache of the user's must not keep rejected drafts
                keep_accepted(self.cache, path, tree.num_nodes)
            self._record(outputs, path, tree.num_nodes)
        self.accept_lengths.append(len(path))
        self._advance(outputs, len(path))
        if not is_done:
            with self.draft_watch.running():
                last = self.drafter.last_position
                self.drafter.extend(
                    features=recorded[0][:, torch.tensor(path, device=recorded[0].device)],
                    next_embeds=embed_tokens(self.target, input_ids[:, -len(path) :]),
                    position_ids=last + 1 + torch.arange(len(path), device=last.device),
                )
        return input_ids, is_done

    def _useful_depth(self, input_ids: torch.LongTensor) -> int:
        """Levels of drafts that could still be emitted; the step itself emits one token more."""
        useful = self.chooser.stopping_criteria.max_length - input_ids.shape[1] - 1
        root_position = self.cache.get_seq_length() - self.num_padding
        limit = max_draft_depth(self.target, root_position, self.table_length)
        return max(0, useful if limit is None else min(useful, limit))

    def _verify(self, tree: DraftTree, input_ids: torch.LongTensor) -> ModelOutput:
        """Run the target on all nodes of the tree: root, then drafts. Logits of shape `(1, nodes, vocab)`."""
        if self.mode is VerificationMode.CHAIN:
            kwargs = self._extended(ModelOutput(), tree.num_nodes - 1)
            model_inputs = self.target.prepare_inputs_for_generation(
                torch.cat([input_ids, tree.tokens[:, 1:]], dim=1), next_sequence_length=tree.num_nodes, **kwargs
            )
            return self.target(**model_inputs, return_dict=True)

        kwargs = copy.copy(self.model_kwargs)
        padding_mask = kwargs.pop("attention_mask", None)
        kwargs["position_ids"] = kwargs["position_ids"][..., -1:] + tree.depths
        for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., -1:].expand_as(tree.tokens)
        model_inputs = self.target.prepare_inputs_for_generation(
            tree.tokens, next_sequence_length=tree.num_nodes, **kwargs
        )
        # Set last, because some families make their own of both
        model_inputs["position_ids"] = kwargs["position_ids"]
        model_inputs["attention_mask"] = tree_attention_mask(tree, self.cache, self.target, padding_mask)
        return self.target(**model_inputs, return_dict=True)

    def _advance(self, outputs: ModelOutput, num_new_tokens: int) -> None:
        self.model_kwargs = self._extended(outputs, num_new_tokens)

    def _extended(self, outputs: ModelOutput, num_new_tokens: int) -> dict[str, Any]:
        """The model inputs with room for new tokens: one at a time, because plain decoding repeats the last type."""
        kwargs = copy.copy(self.model_kwargs)
        for _ in range(num_new_tokens):
            kwargs = self.target._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        return kwargs

    def _record(self, outputs: ModelOutput, path: list[int] | None = None, num_nodes: int = 0) -> None:
        """Keep hidden states and attentions, if asked for, one entry a token as in plain decoding."""
        if not self.generation_config.return_dict_in_generate:
            return
        if self.generation_config.output_hidden_states:
            layers = outputs.hidden_states
            self.hidden_states += (layers,) if path is None else tuple(hidden_states_of_path(layers, path))
        if self.generation_config.output_attentions:
            layers = outputs.attentions
            self.attentions += (
                (layers,) if path is None else tuple(attentions_of_path(layers, path, num_nodes, self.cache))
            )
