"""`fspad demo`: the same prompts plain and with an FSPAD head, the texts compared and the time measured."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fspad.bench.exactness import Exactness, check_exactness
from fspad.bench.machine import default_device, describe_setup
from fspad.bench.measuring import Comparison, compare, total
from fspad.bench.questions import encode_dialogue, read_questions

from .loading import choose_dtype, find_shipped_head, load_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Enough to see that texts are equal, in the slower dtype.
CHECK_PROMPTS = 2
CHECK_TOKENS = 32
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


def run_demo(
    console: Console,
    head_name: str | None,
    target_name: str | None,
    dtype_name: str,
    prompts_file: Path | None,
    max_new_tokens: int,
    num_prompts: int,
    temperature: float,
    num_draft_tokens: int | None = None,
) -> bool:
    """Load everything, compare, and print.

    Returns:
        Whether the answers are as they must be: identical in fp32.

    Raises:
        ValueError: If head and target do not belong together.
    """
    prompts = [question.turns[0] for question in read_questions(prompts_file)] if prompts_file else PROMPTS
    prompts = prompts[:num_prompts]
    with console.status("Loading the head and its target ..."):
        dtype = choose_dtype(dtype_name, default_device())
        target, tokenizer, head = load_pair(head_name or str(find_shipped_head()), target_name, dtype)
    if num_draft_tokens is not None:
        head.config.num_draft_tokens = num_draft_tokens
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Answering plain and with FSPAD in turn", total=2 * len(prompts))
        inputs = [encode_dialogue(tokenizer, [prompt], [], target.device) for prompt in prompts]
        comparisons = compare(target, head, inputs, max_new_tokens, temperature, lambda: progress.advance(task))
    for prompt, comparison in zip(prompts, comparisons, strict=True):
        print_answers(console, tokenizer, prompt, comparison)
    console.print(results_table(comparisons))
    everything = total(comparisons)
    setup = describe_setup(target.device, target.dtype)
    print_setup(console, everything, setup)
    if target.dtype != torch.float32:
        if not everything.is_identical:
            console.print(f"{setup['dtype']}: {NEAR_TIES}.", highlight=False)
        with console.status("Checking that the answers are identical in float32 ..."):
            exactness = check_in_float32(target, head, inputs[:CHECK_PROMPTS])
    elif temperature > 0:
        # The same seed gives the same tokens, and what is close in a draw is not known
        exactness = Exactness(everything.num_identical, 0, len(comparisons) - everything.num_identical)
    else:
        exactness = check_exactness(target, inputs, comparisons)
    is_fine = exactness is None or not exactness.different
    console.print(
        verdict(everything, exactness), style="bold" if is_fine else "bold red", highlight=False, markup=False
    )
    return is_fine


def check_in_float32(
    target: PreTrainedModel, head: PreTrainedModel, inputs: list[dict[str, torch.Tensor]]
) -> Exactness | None:
    """Compare short greedy answers in fp32, to which both models are converted for good.

    Returns:
        The counts, or `None` if the target has no room in fp32.
    """
    try:
        target, head = target.float(), head.float()
        return check_exactness(target, inputs, compare(target, head, inputs, CHECK_TOKENS))
    except torch.OutOfMemoryError:
        return None


def verdict(everything: Comparison, exactness: Exactness | None) -> str:
    """What came out, in one sentence.

    Args:
        everything: All answers.
        exactness: What the check in fp32 counted; `None` if it could not be made.

    Returns:
        The sentence; of a head that makes it slower it says why.
    """
    speedup, tau = everything.speedup, everything.tau
    check = f"fp32 check: {exactness or 'no memory for it'}"
    check += ", which must not be: please report this." if exactness and exactness.different else "."
    if speedup >= 1:
        return f"{speedup:.2f}x faster than plain generate (tau {tau:.2f}); {check}"
    plain, draft, verify = (
        everything.plain_step_seconds,
        everything.draft_step_seconds,
        everything.verify_step_seconds,
    )
    if not (plain and verify):
        return f"{speedup:.2f}x the speed of plain generate, as nothing was drafted; {check}"
    return (
        f"{speedup:.2f}x the speed of plain generate: a step takes as long as {(draft + verify) / plain:.2f} plain ones "
        f"({verify / plain:.2f} for verification, {draft / plain:.2f} for drafting) and yields {tau:.2f} tokens (tau); "
        f"{check}"
    )


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


def print_setup(console: Console, everything: Comparison, setup: Mapping[str, Any]) -> None:
    """Print where the time went, and what the figures depend on."""
    draft, verify, seconds = (
        sum(getattr(answer, name) for answer in everything.assisted)
        for name in ("draft_seconds", "verify_seconds", "seconds")
    )
    console.print(
        f"FSPAD's time: {draft / seconds:.0%} drafting, {verify / seconds:.0%} verification", highlight=False
    )
    releases = ", ".join(f"{name} {setup[name]}" for name in ("torch", "transformers", "fspad"))
    line = f"{setup['machine']}; {releases}; {setup['dtype']}; {setup['threads']} threads"
    console.print(line, highlight=False, markup=False)
