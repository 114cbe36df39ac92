"""Targets, tokenizers and heads that a trainer makes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fspad import FSPADModel
from fspad.bench.machine import target_dtype
from fspad.provenance import note_default_revision, vocabulary_hash

from .data import count_token_frequencies, most_frequent_tokens

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# So many rows of a stream tell which tokens are frequent.
_COUNTED_ROWS = 10_000


def load_target(name: str, device: torch.device | None = None) -> PreTrainedModel:
    """Load a target.

    Args:
        name: Hub id or folder.
        device: Where it is to run, which decides about its dtype; by default on the accelerator, if there is one.

    Returns:
        The target, still on the processor.
    """
    target = AutoModelForCausalLM.from_pretrained(name, dtype=target_dtype(device))
    note_default_revision(target.config)
    return target


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a target.

    Args:
        name: Hub id or folder.

    Returns:
        The tokenizer; `None` if there is none, which rows of token ids do without.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        logger.warning(f"No tokenizer could be loaded from {name}, only token ids can be trained on: {error}")
        return None


def warn_of_another_tokenizer(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say once that a tokenizer has not the vocabulary of the one that lies beside the target on this machine.

    Args:
        target: The target; one without a name, or without a tokenizer that is at hand, is passed over.
        tokenizer: The tokenizer that dialogues are to be tokenized with.
    """
    name = target.config._name_or_path
    if not name or name == getattr(tokenizer, "name_or_path", None):
        return
    try:
        own = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # anything: no tokenizer is no reason to stop
        return
    if vocabulary_hash(own) != vocabulary_hash(tokenizer):
        logger.warning(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has another vocabulary "
            f"than the one of the target {name!r}: the head learns from texts that the target would not read like this."
        )


def make_head(target: PreTrainedModel, seed: int) -> FSPADModel:
    """Make a new head.

    Args:
        target: The target.
        seed: Seed of its weights: the same head in every process, of each of which FSDP takes a part.

    Returns:
        A head in float32, since updates get lost in weights of half precision.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return FSPADModel.from_target(target).float()


def trim_vocabulary(
    head: FSPADModel,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    size: int,
) -> float:
    """Let the head score the tokens that the assistant writes most often in a dataset, or first in a stream.

    Args:
        head: The head, changed in place.
        dataset: The prepared training dialogues.
        tokenizer: The target's tokenizer; its special tokens are always in.
        size: How many tokens.

    Returns:
        The share of the assistant's tokens that is among them.

    Raises:
        ValueError: If `size` is larger than the vocabulary, or smaller than the number of special tokens.
    """
    import datasets

    is_stream = isinstance(dataset, datasets.IterableDataset)
    counts = count_token_frequencies(dataset, head.config.vocab_size, _COUNTED_ROWS if is_stream else None)
    special_ids = [] if tokenizer is None else tokenizer.all_special_ids
    ids = most_frequent_tokens(counts, size, [i for i in special_ids if i < head.config.vocab_size])
    head.set_draft_vocabulary(ids)
    return (counts[ids].sum() / counts.sum()).item()
