"""`fspad demo`: the same prompts plain and with an FSPAD head, the texts compared and the time measured."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import fspad
from fspad.bench.machine import processor_name
from fspad.bench.measuring import Comparison, compare, total
from fspad.provenance import as_hub_id, check_vocabulary

from .loading import encode, find_shipped_head, load_head, load_target, read_prompts
from .smollm2 import TARGET_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = [
    "Describe a morning at a busy fish market in one paragraph.",
    "List three habits that help people sleep better, with one sentence on each.",
    "What does a compiler do? Answer for somebody who has never written a program.",
]
NEAR_TIES = (
    "every token is the target's own choice in its verification pass and may differ from one-at-a-time decoding at "
    "near-ties"
)


def results_table(comparisons: list[Comparison]) -> Table:
    """The measured figures, one line a prompt and one for all.

    Args:
        comparisons: One comparison a prompt.

    Returns:
        A table to print.
    """
    table = Table("prompt")
    for title in ("tokens", "tokens/s plain", "tokens/s FSPAD", "ratio", "tau"):
        table.add_column(title, justify="right")
    lines = [(str(number), comparison) for number, comparison in enumerate(comparisons, start=1)]
    for name, line in [*lines, ("all", total(comparisons))]:
        if name == "all":
            table.add_section()
        speeds = (f"{line.plain_speed:.1f}", f"{line.assisted_speed:.1f}", f"{line.speedup:.2f}")
        table.add_row(name, str(line.num_tokens), *speeds, f"{line.tau:.2f}")
    return table


def describe_setup(dtype: torch.dtype) -> str:
    """What the figures depend on: machine, releases, dtype and threads.

    Args:
        dtype: Dtype of target and head.

    Returns:
        One line of text.
    """
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, fspad {fspad.__version__}"
    return f"{processor_name()}; {versions}; {str(dtype).removeprefix('torch.')}; {torch.get_num_threads()} threads"


def run_demo(
    console: Console,
    head_name: str | None,
    target_name: str | None,
    dtype: torch.dtype,
    prompts_file: Path | None,
    max_new_tokens: int,
    num_prompts: int,
    temperature: float,
) -> bool:
    """Load everything, compare, and print.

    Returns:
        Whether the answers are as they must be: identical in fp32.

    Raises:
        ValueError: If the tokenizer is not that of the target that the head was trained for, or the head does not say
            which target that is.
    """
    prompts = (read_prompts(prompts_file) if prompts_file else PROMPTS)[:num_prompts]
    head_name = head_name or str(find_shipped_head())
    with console.status("Loading the head and its target ..."):
        head = load_head(head_name, dtype)
        recorded = head.config.target_model_name
        if target_name is None and recorded not in (None, TARGET_NAME):
            # A head may come from anybody, and must not say which of this machine's folders are read
            if as_hub_id(recorded) is None:
                raise ValueError(
                    f"expected a head that records the Hub id of its target, got {recorded!r}: name it with `--target`."
                )
            target_name = recorded
        target, tokenizer = load_target(target_name, dtype)
        check_vocabulary(head.config, tokenizer)
        head = head.to(target.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Answering plain and with FSPAD in turn", total=2 * len(prompts))
        inputs = [encode(tokenizer, prompt, target.device) for prompt in prompts]
        comparisons = compare(target, head, inputs, max_new_tokens, temperature, lambda: progress.advance(task))
    for prompt, comparison in zip(prompts, comparisons, strict=True):
        print_answers(console, tokenizer, prompt, comparison)
    console.print(results_table(comparisons))
    return print_summary(console, total(comparisons), target.dtype)


def print_answers(console: Console, tokenizer: PreTrainedTokenizerBase, prompt: str, comparison: Comparison) -> None:
    """Print the answers to one prompt: one text when they are identical, else the difference."""
    plain, assisted = (
        tokenizer.decode(answers[0].token_ids, skip_special_tokens=True).strip()
        for answers in (comparison.plain, comparison.assisted)
    )
    console.rule(style="dim")
    console.print(prompt, style="bold", markup=False)
    console.print(plain, markup=False, highlight=False)
    if comparison.is_identical:
        console.print("plain and FSPAD: identical", style="green")
        return
    console.print("plain and FSPAD differ:", style="yellow")
    lines = difflib.unified_diff(plain.splitlines(), assisted.splitlines(), "plain", "FSPAD", lineterm="")
    console.print("\n".join(lines), markup=False, highlight=False)


def print_summary(console: Console, everything: Comparison, dtype: torch.dtype) -> bool:
    """Print what the figures depend on and the verdict.

    Returns:
        `False` if answers differ that must not.
    """
    draft, verify, seconds = (
        sum(getattr(answer, name) for answer in everything.assisted)
        for name in ("draft_seconds", "verify_seconds", "seconds")
    )
    console.print(
        f"FSPAD's time: {draft / seconds:.0%} drafting, {verify / seconds:.0%} verification", highlight=False
    )
    console.print(describe_setup(dtype), highlight=False, markup=False)
    if everything.is_identical:
        return True
    if dtype != torch.float32:
        console.print(f"{str(dtype).removeprefix('torch.')}: {NEAR_TIES}.", highlight=False)
        return True
    console.print("In float32 the answers must be identical. Please report this.", style="bold red")
    return False
