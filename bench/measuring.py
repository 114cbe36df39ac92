"""Measuring plain generation against generation with an FSPAD head: a few pure functions, without any printing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 8


@dataclass
class Answer:
    """One answer and what it took.

    Args:
        token_ids: The new tokens.
        seconds: Wall time of the whole `generate` call.
        accept_lengths: Tokens emitted by each verification step; empty for plain decoding.
        draft_seconds: Part of the time that went into drafting.
        verify_seconds: Part of the time that went into verification.
    """

    token_ids: list[int]
    seconds: float
    accept_lengths: list[int]
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass
class Comparison:
    """The answers to one or more prompts, plain and with an FSPAD head."""

    plain: list[Answer]
    assisted: list[Answer]

    @property
    def num_tokens(self) -> int:
        """New tokens of the plain answers."""
        return sum(len(answer.token_ids) for answer in self.plain)

    @property
    def is_identical(self) -> bool:
        """Whether both ways gave the same tokens."""
        return [answer.token_ids for answer in self.plain] == [answer.token_ids for answer in self.assisted]

    @property
    def plain_speed(self) -> float:
        """Tokens per second without the head, prefill included."""
        return tokens_per_second(self.plain)

    @property
    def assisted_speed(self) -> float:
        """Tokens per second with the head, prefill included."""
        return tokens_per_second(self.assisted)

    @property
    def speedup(self) -> float:
        """Ratio of the two speeds."""
        return self.assisted_speed / self.plain_speed

    @property
    def tau(self) -> float:
        """Mean tokens per verification step, bonus token included; 1.0 when there was no step."""
        accept_lengths = [length for answer in self.assisted for length in answer.accept_lengths]
        return sum(accept_lengths) / len(accept_lengths) if accept_lengths else 1.0


def tokens_per_second(answers: list[Answer]) -> float:
    """New tokens per second of wall time.

    Args:
        answers: Answers that were measured one after the other.

    Returns:
        All their tokens by all their time.
    """
    return sum(len(answer.token_ids) for answer in answers) / sum(answer.seconds for answer in answers)


def measure(
    target: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    head: PreTrainedModel | None,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Answer:
    """Generate one answer and take the time.

    Args:
        target: The model that answers.
        inputs: `input_ids` and `attention_mask` of one prompt, of shape `(1, length)`.
        head: The FSPAD head, or `None` for plain generation.
        max_new_tokens: Length limit.
        temperature: 0 for greedy decoding, else sampling from a fixed seed.

    Returns:
        The answer.
    """
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(0)
    start = time.perf_counter()
    output = target.generate(
        **inputs, assistant_model=head, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **sampling
    )
    token_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    if head is None:
        return Answer(token_ids, seconds, accept_lengths=[])
    return Answer(token_ids, seconds, output.accept_lengths.flatten().tolist(), output.draft_time, output.verify_time)


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
