"""`fspad synthesize`: the prompts that a target answers, given or written by itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from fspad.trainer.resumable import check_suffix
from fspad.trainer.synthesize import synthesize, write_prompts

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
        ValueError: If there are neither or both kinds of prompts, or none is left to answer.
    """
    check_suffix(output)
    if bool(sources) == (num_prompts is not None):
        got = "both" if sources else "neither"
        raise ValueError(f"expected --prompts FILE_OR_HUB_ID or --num-prompts N, got {got}")
    held_out = {prompt.strip() for prompt in load_prompts(excluded, split)}
    prompts = load_prompts(sources, split)
    target, tokenizer = load_target(target_name, dtype)
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
        ValueError: If a source has no such column, or no prompt at all.
    """
    prompts: dict[str, None] = {}
    for source in sources:
        unusable, repeated, found = [], 0, 0
        for number, prompt in _read_column(source, split):
            if not isinstance(prompt, str) or not prompt.strip():
                unusable.append(number)
                continue
            found += 1
            repeated += prompt in prompts
            prompts[prompt] = None
        if not found:
            raise ValueError(f"expected texts in the column `prompt` of {source}, got none")
        if unusable:
            typer.echo(f"{source}: left out {len(unusable)} prompts that are no text, the first in row {unusable[0]}.")
        if repeated:
            typer.echo(f"{source}: {repeated} prompts are there more than once, or were before.")
    return list(prompts)


def _read_column(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """The column `prompt` of a file or dataset, with the numbers of the lines or rows, from 1 on."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".gz") or (path.is_file() and path.suffix != ".parquet"):
        yield from _read_lines(path)
        return
    if path.suffix == ".parquet" and not path.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'reading {source} needs datasets: `pip install "fspad[train]"`') from error
    if path.is_file():
        rows = datasets.load_dataset("parquet", data_files=source, split="train")
    else:
        rows = datasets.load_dataset(source, split=split)
    if "prompt" not in rows.column_names:
        raise ValueError(f"expected a column `prompt` in {source}, got {', '.join(rows.column_names)}")
    yield from enumerate(rows["prompt"], start=1)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield number, json.loads(line)["prompt"]
                except (json.JSONDecodeError, KeyError, RecursionError, TypeError) as error:
                    raise ValueError(f'{path}:{number}: expected {{"prompt": "..."}}, got {line[:80]!r}') from error
    except (EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON lines in UTF-8 in {path}, got what cannot be read: {error}") from error
