"""Measuring plain generation against assisted generation: a few pure functions, without any printing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from .forward_watch import ForwardWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 8


def mean_tokens_per_step(accept_lengths: Iterable[int]) -> float:
    """tau, the mean number of tokens that a verification step emits.

    Args:
        accept_lengths: Tokens emitted by each step, the target's own (bonus) token included.

    Returns:
        All tokens by all steps; 1.0, as in plain decoding, when there was no step.
    """
    lengths = list(accept_lengths)
    return sum(lengths) / len(lengths) if lengths else 1.0


def acceptance_by_depth(accept_lengths: Iterable[int]) -> list[float]:
    """How often drafts are accepted to each depth.

    Args:
        accept_lengths: Tokens emitted by each step, the target's own (bonus) token included.

    Returns:
        Share of all steps that accepted at least 1, 2 and so on drafted tokens, to the deepest that was accepted. Their sum
        is tau - 1.
    """
    lengths = list(accept_lengths)
    return [sum(length > depth for length in lengths) / len(lengths) for depth in range(1, max(lengths, default=1))]


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Args:
        token_ids: The new tokens.
        seconds: Wall time of the whole `generate` call.
        accept_lengths: Tokens emitted by each verification step; empty for plain decoding. The tokens of the prefill are
            of no step.
        draft_seconds: Part of the time that went into drafting; `None` where nothing tells it.
        verify_seconds: Part of the time that went into the steps of the target after the prefill.
        prefill_seconds: Part of the time that went into the first forward pass.

    Raises:
        ValueError: If a step emitted nothing, or a time is not positive.
    """

    token_ids: list[int]
    seconds: float
    accept_lengths: list[int] = field(default_factory=list)
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    prefill_seconds: float | None = None

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.accept_lengths):
            raise ValueError(f"expected accept_lengths of at least 1, got {min(self.accept_lengths)}: measure again.")
        if not self.seconds > 0:
            raise ValueError(f"expected seconds to be positive, got {self.seconds}: measure again.")


@dataclass(frozen=True)
class Comparison:
    """The answers to one or more prompts, plain and assisted."""

    plain: list[Answer]
    assisted: list[Answer]

    @property
    def num_tokens(self) -> int:
        """New tokens of the plain answers."""
        return sum(len(answer.token_ids) for answer in self.plain)

    @property
    def num_identical(self) -> int:
        """How many answers have the same tokens both ways."""
        return sum(
            plain.token_ids == assisted.token_ids for plain, assisted in zip(self.plain, self.assisted, strict=True)
        )

    @property
    def is_identical(self) -> bool:
        """Whether both ways gave the same tokens."""
        return self.num_identical == len(self.plain)

    @property
    def plain_speed(self) -> float:
        """Tokens per second without assistance, prefill included."""
        return tokens_per_second(self.plain)

    @property
    def assisted_speed(self) -> float:
        """Tokens per second with assistance, prefill included."""
        return tokens_per_second(self.assisted)

    @property
    def speedup(self) -> float:
        """Ratio of the two speeds."""
        return self.assisted_speed / self.plain_speed

    @property
    def accept_lengths(self) -> list[int]:
        """Tokens emitted by each verification step of all answers."""
        return [length for answer in self.assisted for length in answer.accept_lengths]

    @property
    def tau(self) -> float:
        """Mean tokens per verification step, bonus token included; 1.0 when there was no step."""
        return mean_tokens_per_step(self.accept_lengths)

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the steps of all answers that accepted at least 1, 2 and so on drafted tokens."""
        return acceptance_by_depth(self.accept_lengths)

    @property
    def plain_step_seconds(self) -> float | None:
        """Mean time of one step of plain decoding, the prefill left out; `None` if it is not known."""
        prefill = _total(answer.prefill_seconds for answer in self.plain)
        num_steps = self.num_tokens - len(self.plain)
        if prefill is None or num_steps <= 0:
            return None
        return (sum(answer.seconds for answer in self.plain) - prefill) / num_steps

    @property
    def draft_step_seconds(self) -> float | None:
        """Mean time that goes into drafting for one verification step; `None` if it is not known."""
        return self._per_step(answer.draft_seconds for answer in self.assisted)

    @property
    def verify_step_seconds(self) -> float | None:
        """Mean time of one verification step; `None` if it is not known."""
        return self._per_step(answer.verify_seconds for answer in self.assisted)

    @property
    def efficiency(self) -> float | None:
        """The speedup by the one there were if everything but the steps of the target took no time.

        With tau tokens a step, of which each takes as long as it does, that is tau * t(1) / t(n + 1), the time of a plain
        step by that of a verification step of n drafts. What is lost is drafting, prefill, and all other work.
        """
        plain, verify = self.plain_step_seconds, self.verify_step_seconds
        return self.speedup / (self.tau * plain / verify) if plain and verify else None

    def _per_step(self, times: Iterable[float | None]) -> float | None:
        seconds, num_steps = _total(times), len(self.accept_lengths)
        return None if seconds is None or not num_steps else seconds / num_steps


def _total(times: Iterable[float | None]) -> float | None:
    known = list(times)
    return None if not known or None in known else sum(known)


def tokens_per_second(answers: list[Answer]) -> float:
    """New tokens per second of wall time.

    Args:
        answers: Answers that were measured one after the other.

    Returns:
        All their tokens by all their time.
    """
    return sum(len(answer.token_ids) for answer in answers) / sum(answer.seconds for answer in answers)


class _StepLengths(BaseStreamer):
    """What stock assisted decoding emits at each step, which it tells nobody but a streamer."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.lengths.append(value.numel())

    def end(self) -> None: ...


def measure(
    target: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    head: PreTrainedModel | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    **options: Any,
) -> Answer:
    """Generate one answer and take the time.

    Args:
        target: The model that answers.
        inputs: `input_ids` and `attention_mask` of one prompt, of shape `(1, length)`.
        head: The FSPAD head, or `None` for plain generation.
        max_new_tokens: Length limit.
        temperature: 0 for greedy decoding, else sampling from a fixed seed.
        **options: Options of `generate` that assist it without a head, such as `prompt_lookup_num_tokens`.

    Returns:
        The answer.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    stock_lengths = _StepLengths() if options else None
    torch.manual_seed(0)
    with ForwardWatch(target) as watch:
        start = time.perf_counter()
        output = target.generate(
            **inputs,
            assistant_model=head,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            streamer=stock_lengths,
            **sampling,
            **options,
        )
        token_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
    prefill, steps = (watch.prefill.seconds(), watch.steps.seconds()) if watch.num_forwards else (None, None)
    if head is None:
        # First the prompt is put, then what the prefill emits
        accept_lengths = stock_lengths.lengths[2:] if stock_lengths else []
        return Answer(token_ids, seconds, accept_lengths, None, steps, prefill)
    accept_lengths = output.accept_lengths.flatten().tolist()
    return Answer(token_ids, seconds, accept_lengths, output.draft_time, output.verify_time, prefill)


def compare(
    target: PreTrainedModel,
    head: PreTrainedModel,
    prompts: list[dict[str, torch.Tensor]],
    max_new_tokens: int,
    temperature: float = 0.0,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Answer every prompt plain and with the head, after a warm-up of both.

    Which of the two goes first alternates, so that a machine that gets slower or faster meanwhile favours neither.

    Args:
        target: The model that answers.
        head: The FSPAD head.
        prompts: Inputs of the target, one prompt each.
        max_new_tokens: Length limit.
        temperature: 0 for greedy decoding.
        on_answer: Called after every measured answer.

    Returns:
        One comparison a prompt.
    """
    for assistant in (None, head):
        measure(target, prompts[0], assistant, min(WARM_UP_TOKENS, max_new_tokens), temperature)
    comparisons = []
    for index, inputs in enumerate(prompts):
        answers = {}
        for assisted in (False, True) if index % 2 == 0 else (True, False):
            answers[assisted] = measure(target, inputs, head if assisted else None, max_new_tokens, temperature)
            on_answer()
        comparisons.append(Comparison([answers[False]], [answers[True]]))
    return comparisons


def total(comparisons: list[Comparison]) -> Comparison:
    """Put comparisons together.

    Args:
        comparisons: One or more comparisons.

    Returns:
        One comparison over all their answers.
    """
    return Comparison(
        plain=[answer for comparison in comparisons for answer in comparison.plain],
        assisted=[answer for comparison in comparisons for answer in comparison.assisted],
    )
