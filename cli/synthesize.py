"""`fspad synthesize`: the prompts that a target answers, given or written by itself."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import typer

from fspad.trainer.resumable import check_output
from fspad.trainer.synthesize import check_settings, check_temperatures, synthesize, write_prompts

from .loading import load_target


def run_synthesis(
    output: Path,
    sources: Sequence[str],
    split: str,
    num_prompts: int | None,
    excluded: Sequence[str],
    target_name: str | None,
    dtype: torch.dtype | None,
    temperatures: Sequence[float],
    batch_size: int,
    max_new_tokens: int,
    seed: int,
) -> int:
    """Load the target, let it write the prompts if there are none, and let it answer them.

    Args:
        output: File of dialogues, `.jsonl` or `.parquet`.
        sources: Files or Hub ids of prompts.
        split: Split of datasets from the Hub.
        num_prompts: How many prompts the target shall write instead, into `.prompts.jsonl` beside the output.
        excluded: Files or Hub ids of prompts that must not be answered.
        target_name: Hub id or folder; `None` for SmolLM2-135M-Instruct.
        dtype: Dtype of the target; `None` for that of the checkpoint.
        temperatures: Used in turn.
        batch_size: Prompts at once.
        max_new_tokens: Longest answer.
        seed: Seed of prompts and answers.

    Returns:
        How many dialogues were written.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If there are neither or both kinds of prompts, none is left to answer, or target and settings do not go
            together.
    """
    check_output(output)
    check_temperatures(temperatures)
    if bool(sources) == (num_prompts is not None):
        got = "both" if sources else "neither"
        raise ValueError(f"expected --prompts FILE_OR_HUB_ID or --num-prompts N, got {got}")
    held_out = {prompt.strip() for prompt in load_prompts(excluded, split)}
    prompts = load_prompts(sources, split)
    target, tokenizer = load_target(target_name, dtype)
    # Before prompts are written, which takes long
    check_settings(target, tokenizer, temperatures, max_new_tokens)
    if num_prompts is not None:
        prompts_file = output.with_suffix(".prompts.jsonl")
        prompts = write_prompts(target, tokenizer, num_prompts, prompts_file, batch_size=batch_size, seed=seed)
    kept = [prompt for prompt in prompts if prompt.strip() not in held_out]
    if len(kept) < len(prompts):
        typer.echo(f"{len(prompts) - len(kept)} prompts are held out and not answered.")
    if not kept:
        raise ValueError(f"expected prompts that are not held out, got none among {len(prompts)}")
    return synthesize(target, tokenizer, kept, output, temperatures, batch_size, max_new_tokens, seed)


def load_prompts(sources: Sequence[str], split: str = "train") -> list[str]:
    """Load prompts, each one once. What is no text is left out, and the number of these is printed.

    Args:
        sources: JSON-lines (may be gzipped) or Parquet files, or Hub ids, with a column `prompt`.
        split: Split of datasets from the Hub.

    Returns:
        The prompts in their order.

    Raises:
        FileNotFoundError: If there is no such file or dataset.
        ImportError: If reading a source needs a package that is missing.
        ValueError: If a source cannot be read, or has no such column or no prompt at all.
    """
    prompts: dict[str, None] = {}
    for source in sources:
        unusable, repeated, found = [], 0, 0
        for number, prompt in _read_column(source, split):
            if not _is_text(prompt):
                unusable.append(number)
                continue
            found += 1
            repeated += prompt in prompts
            prompts[prompt] = None
        if not found:
            raise ValueError(
                f"expected texts in the column `prompt` of {source}, got none: name another file or dataset"
            )
        if unusable:
            typer.echo(f"{source}: left out {len(unusable)} prompts that are no text, the first in row {unusable[0]}.")
        if repeated:
            typer.echo(f"{source}: {repeated} prompts are there more than once, or were before.")
    return list(prompts)


def _is_text(prompt: Any) -> bool:
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    try:
        prompt.encode()
    except UnicodeEncodeError:  # JSON may hold halves of characters, which no tokenizer takes
        return False
    return True


def _read_column(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """The column `prompt` of a file or dataset, with the numbers of the lines or rows, from 1 on."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".gz", ".parquet") and not path.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if path.is_file():
        yield from (_read_parquet if path.suffix == ".parquet" else _read_lines)(path)
        return
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'reading {source} needs datasets: `pip install "fspad[train]"`') from error
    try:
        rows = datasets.load_dataset(source, split=split)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        if isinstance(error, OSError):
            raise  # e.g. no such dataset, no network: it says so itself
        reason = shorten(str(error.__cause__ or error), 300)
        raise ValueError(f"expected prompts in {source}, got what cannot be read: {reason}") from error
    _check_columns(source, rows.column_names)
    yield from enumerate(rows["prompt"], start=1)


def _check_columns(source: Path | str, names: list[str]) -> None:
    if "prompt" not in names:
        raise ValueError(f"expected a column `prompt` in {source}, got {', '.join(names)}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f'reading {path} needs pyarrow: `pip install "fspad[train]"`') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            batches = (batch["prompt"] for batch in file.iter_batches(columns=["prompt"]))
            yield from enumerate((prompt for batch in batches for prompt in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected Parquet in {path}, got what cannot be read: {shorten(str(error), 300)}") from error


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        # Some editors write a mark of the encoding before the first line
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)["prompt"]
                except (ValueError, KeyError, RecursionError, TypeError) as error:
                    raise ValueError(f'{path}:{number}: expected {{"prompt": "..."}}, got {line[:80]!r}') from error
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"expected JSON lines in UTF-8 in {path}, got what cannot be read: {error}") from error
