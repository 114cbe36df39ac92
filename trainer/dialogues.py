"""Datasets of dialogues: files, datasets of the Hub, and mixtures of them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import datasets

from .data import prepare_dataset
from .dialogue_files import check_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


def load_dialogues(path: str | Path, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a file of dialogues.

    Args:
        path: JSON-lines file, maybe gzipped, or Parquet file.
        streaming: Whether to read it only while it is gone through.

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.stat().st_size:
        raise ValueError(f"expected dialogues in {path}, got an empty file")
    builder = "parquet" if path.suffix == ".parquet" else "json"
    if builder == "json":
        check_rows(path)
    return _load(str(path), builder, streaming, data_files=str(path), split="train")


def load_hub_dialogues(name: str, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Load a dataset of dialogues from the Hub.

    Args:
        name: Its id, with the name of one of its configurations after a colon if it has several.
        split: Its split.
        streaming: Whether to read it only while it is gone through.

    Returns:
        The dataset.

    Raises:
        OSError: If there is no such dataset.
        ValueError: If it cannot be read.
    """
    name, _, config = name.partition(":")
    return _load(name, name, streaming, split=split, **({"name": config} if config else {}))


def mix_dialogues(
    parts: Sequence[Dataset | IterableDataset],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    weights: Sequence[float] | None = None,
    seed: int = 42,
) -> Dataset | IterableDataset:
    """Put datasets of dialogues together, whatever their forms.

    Args:
        parts: The datasets.
        tokenizer: The target's tokenizer.
        max_length: Longer dialogues are cut to this many tokens.
        weights: Share of each in the rows of the mixture, up to a common factor: rows are drawn from one or the other until
            one has no more. `None` takes all rows, one dataset after the other.
        seed: Seed of the draws.

    Returns:
        The dataset, prepared for the trainer.

    Raises:
        ValueError: If there are not as many weights as datasets, or one is not positive.
    """
    if weights is not None and (
        len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights)
    ):
        raise ValueError(f"expected a positive weight for each of the {len(parts)} datasets, got {list(weights)}")
    prepared = [prepare_dataset(part, tokenizer, max_length) for part in parts]
    if weights is None:
        return datasets.concatenate_datasets(prepared)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(prepared, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")


def _load(source: str, builder: str, streaming: bool, **kwargs: Any) -> Dataset | IterableDataset:
    verbosity = datasets.logging.get_verbosity()
    # What it logs of a file that cannot be read is said again by its error.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        dataset = datasets.load_dataset(builder, streaming=streaming, **kwargs)
        # Streams read nothing before, and texts are decoded only now.
        next(iter(dataset), None)
        return dataset
    except Exception as error:
        # Anything: each format has errors of its own, and datasets wraps some of them.
        reason = (isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__) or error
        if isinstance(reason, OSError) and not isinstance(reason, gzip.BadGzipFile):
            raise reason from None  # e.g. no permission, no network, no room for the cache: it says so itself
        raise ValueError(
            f"expected dialogues in JSON lines (.gz or not) or Parquet, got {source}, which cannot be read: "
            f"{shorten(str(reason), 300)}"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
