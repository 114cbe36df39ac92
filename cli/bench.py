"""`fspad bench`: a head against plain generation and its peers, on questions of Spec-Bench or of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fspad.bench.machine import default_device, describe_setup
from fspad.bench.methods import Method, choose_methods, head_hash, make_methods
from fspad.bench.questions import choose_questions, read_questions
from fspad.bench.records import AnswerRecord, append_record, begin_records, read_records, read_setup
from fspad.bench.report import cells, check_plots, write_report
from fspad.bench.running import Benchmark
from fspad.bench.summary import Row, summarize_methods
from fspad.provenance import check_vocabulary, target_revision

from .loading import choose_dtype, find_shipped_head, load_head, load_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a table on a terminal has room for.
_SHOWN = ("Temperature", "Method", "Tokens/s", "Speedup", "Median", "Least", "tau")


@dataclass(frozen=True)
class BenchOptions:
    """The command line of `fspad bench`.

    Args:
        questions: JSON-lines file of questions.
        records: File that the answers are recorded in.
        output: Folder for the report, if there is to be one.
        head: Folder or Hub id of the head; by default the one of the checkout.
        target: Folder or Hub id of the target; by default the one that the head was trained for.
        also: Other heads, as `NAME=FOLDER`.
        dtype: `auto`, `float32` or `bfloat16`.
        methods: Names of the methods; by default all.
        name: Name of the set of questions; by default that of its file.
        all_turns: Whether all messages of a question are answered, or the first.
        per_category: How many questions of each task; by default all.
        temperatures: 0 for greedy decoding.
        max_new_tokens: Length limit of an answer.
        early_exit: Number of the target's own layers that draft.
    """

    questions: Path
    records: Path
    output: Path | None = None
    head: str | None = None
    target: str | None = None
    also: Sequence[str] = ()
    dtype: str = "auto"
    methods: Sequence[str] = ()
    name: str | None = None
    all_turns: bool = True
    per_category: int | None = None
    temperatures: Sequence[float] = (0.0,)
    max_new_tokens: int = 128
    early_exit: int | None = None

    @property
    def prompts(self) -> str:
        """What the set of questions is called."""
        return self.name or self.questions.stem


def run_bench(console: Console, options: BenchOptions) -> None:
    """Measure what is not measured yet, and print the results.

    Raises:
        ImportError: If a report is asked for and matplotlib is missing.
        OSError: If a file is missing or cannot be written.
        ValueError: If options contradict each other, what is loaded does not fit, or the records were begun with another
            setup.
    """
    if options.output is not None:
        check_plots()  # before hours of measuring
    questions = choose_questions(read_questions(options.questions), options.per_category)
    others = _parse_also(options.also)
    head_name = options.head or str(find_shipped_head())
    with console.status("Loading target and heads ..."):
        dtype = choose_dtype(options.dtype, default_device())
        target, tokenizer, head = load_pair(head_name, options.target, dtype)
        heads = {name: load_head(folder, dtype).to(target.device) for name, folder in others.items()}
    for other in heads.values():
        check_vocabulary(other.config, tokenizer)
    methods = choose_methods(make_methods(head, target, heads, options.early_exit), options.methods)
    benchmark = Benchmark(
        target,
        tokenizer,
        methods,
        options.prompts,
        questions,
        list(dict.fromkeys(options.temperatures)),
        options.max_new_tokens,
        options.all_turns,
    )
    setup = {"head": Path(head_name).name, **find_setup(options, target, head, heads, methods)}
    records = begin_records(options.records, setup)
    measure_all(console, benchmark, records, options.records)
    report(console, options.records, options.output)


def find_setup(
    options: BenchOptions,
    target: PreTrainedModel,
    head: PreTrainedModel,
    heads: Mapping[str, PreTrainedModel],
    methods: Sequence[Method],
) -> dict[str, Any]:
    """What answers must have in common to be compared.

    Args:
        options: The command line.
        target: The target.
        head: The head.
        heads: Other heads by their names.
        methods: The methods.

    Returns:
        The setup, as JSON can hold it. Questions and temperatures can be added to a file, so neither choice is in it.
    """
    return {
        "head_sha256": head_hash(head),
        **{f"also_{name}_sha256": head_hash(other) for name, other in heads.items()},
        "target": target.name_or_path,
        "target_revision": target_revision(target.config),
        **describe_setup(target.device, target.dtype),
        "methods": [method.name for method in methods],
        "early_exit": options.early_exit,
        "prompts": options.prompts,
        "questions_sha256": hashlib.sha256(options.questions.read_bytes()).hexdigest(),
        "turns": "all" if options.all_turns else "first",
        "max_new_tokens": options.max_new_tokens,
    }


def measure_all(console: Console, benchmark: Benchmark, records: Sequence[AnswerRecord], path: Path) -> None:
    """Measure what is not recorded yet, with a progress bar.

    Args:
        console: Where the bar is shown.
        benchmark: What to measure.
        records: What there is.
        path: File that each answer is appended to.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("Answering with all methods in turn", total=benchmark.num_answers)
        progress.advance(bar, benchmark.num_done(records))

        def keep(record: AnswerRecord) -> None:
            append_record(path, record)
            progress.advance(bar)

        benchmark.run(records, keep)


def report(console: Console, path: Path, output: Path | None) -> None:
    """Print the results over all tasks, and write the report if there is to be one.

    Args:
        console: Where to print.
        path: File of recorded answers.
        output: Folder for the report.

    Raises:
        ImportError: If a report is asked for and matplotlib is missing.
        OSError: If a file is missing or cannot be written.
        ValueError: If the file is none of recorded answers.
    """
    records, setup = read_records(path), read_setup(path)
    console.print(_overview([row for row in summarize_methods(records) if row.task is None]))
    facts = [f"{name} {setup[name]}" for name in ("machine", "dtype", "threads") if name in setup]
    console.print("; ".join(facts), highlight=False, markup=False)
    if output is not None:
        console.print(f"Report: {write_report(records, setup, output)}", highlight=False, markup=False)


def _overview(rows: Sequence[Row]) -> Table:
    table = Table()
    for name in _SHOWN:
        table.add_column(name, justify="left" if name in ("Temperature", "Method") else "right", no_wrap=True)
    for row in rows:
        texts = cells(row)
        table.add_row(*(texts[name] or "" for name in _SHOWN))
    return table


def _parse_also(texts: Sequence[str]) -> dict[str, str]:
    others = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"expected `--also NAME=FOLDER`, got {text!r}")
        if name in others:
            raise ValueError(f"expected a name of its own for each `--also`, got two of {name!r}")
        others[name] = folder
    return others
