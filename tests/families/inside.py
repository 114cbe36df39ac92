"""What the suite needs of the inside of fspad: how drafts are proposed, and what the warnings say of verification."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from families.tiny_models import FIRST_SPECIAL
from fspad.candidates import Candidates
from fspad.draft_source import DraftSource, Emitted


class TrueSource(DraftSource):
    """Proposes the true continuation to a random depth, among distractors: random heads rarely get that far.

    Args:
        truth: The true tokens, without padding.
        seed: Seed of depths and distractors.
        is_chain: Whether every node has one child only.
    """

    def __init__(self, truth: list[int], seed: int, is_chain: bool):
        self.truth, self.rng, self.is_chain = truth, random.Random(seed), is_chain
        self.next_position = 0

    def extend(self, emitted: Emitted) -> None:
        self.next_position = int(emitted.position_ids[0, -1]) + 2

    def propose(self, candidates: list[Candidates], size: Any, max_depth: int) -> None:
        future = self.truth[self.next_position :][: min(self.rng.randint(0, 9), max_depth)]
        last, true_parent = [0], 0
        for level, token in enumerate(future, start=1):
            number = 0 if self.is_chain else self.rng.randint(0, 3)
            proposed = [(self.rng.choice(last), self.rng.randrange(FIRST_SPECIAL)) for _ in range(number)]
            # A chain is wrong now and then too, and so is what follows
            is_wrong = self.is_chain and self.rng.random() < 0.1
            true = (true_parent, self.rng.randrange(FIRST_SPECIAL) if is_wrong else token)
            proposed.insert(self.rng.randint(0, number), true)
            # The truth is surest, so that it is the path to verify where only one can be
            last = [candidates[0].add(*node, -level * (0.01 if node == true else 1.0)) for node in proposed]
            true_parent = candidates[0].find(*true)


def draft_the_truth(head: Any, truth: list[int], seed: int) -> None:
    """Let a head draft what plain decoding has written, beside what it drafts anyway.

    Args:
        head: The head.
        truth: The true tokens, without padding.
        seed: Seed of depths and distractors.
    """
    head.config.num_draft_tokens = 64
    stock = type(head).draft_sources

    def draft_sources(target: PreTrainedModel, prompt_ids: torch.Tensor, top_k: int, noise: Any) -> list[DraftSource]:
        return [TrueSource(truth, seed, top_k == 1), *stock(head, target, prompt_ids, top_k, noise)]

    head.draft_sources = draft_sources


@contextmanager
def watching_mode() -> Iterator[list[str]]:
    """Collect how calls of `generate` verify: `tree`, `chain` or `plain`, followed by the reason that the warning gives."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("fspad")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    transformers_logging.warning_once.cache_clear()
    mode = []
    try:
        yield mode
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
        mode.append("tree")
        for message in messages:
            for name, sign in (("chain", "verifies a chain"), ("plain", "plain decoding")):
                if sign in message:
                    mode[:] = [name, message.partition(": ")[2]]
