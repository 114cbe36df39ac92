"""Measurements of a head: from measured answers to the tables and the model index of a card."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from huggingface_hub import EvalResult

from fspad.bench.markdown import count, inline, table, temperature
from fspad.bench.measuring import Comparison
from fspad.bench.records import FSPAD, AnswerRecord, pair_with_plain

METRICS = {"tau": "Mean tokens per step of the target", "speedup": "Tokens per second relative to plain generate"}


@dataclass(frozen=True)
class Measurement:
    """One run over a set of prompts, batch size 1.

    Args:
        prompts: Name of the set of prompts.
        temperature: 0 for greedy decoding.
        tau: Mean tokens per verification step, bonus token included.
        speedup: Tokens per second by those of plain `generate` in the same run, prefill included.
        tokens_per_second: Speed with the head.
        num_prompts: Size of the set.
        machine: What it ran on.
        dtype: Dtype of target and head.
        threads: Threads that torch used.
        task: Which part of the set the prompts are; `None` for the whole set.
        acceptance_by_depth: Share of the steps whose draft was accepted to at least depth 1, 2 and so on. As records
            of answers tell it: of the steps that emitted more than 1, 2 and so on tokens.
        num_plain_prompts: Prompts that were answered by plain `generate` too, from which the speedup is.
        num_identical: How many of those got the same tokens both ways.

    Raises:
        ValueError: If a number cannot come from a measurement.
    """

    prompts: str
    temperature: float
    tau: float
    speedup: float | None = None
    tokens_per_second: float | None = None
    num_prompts: int | None = None
    machine: str | None = None
    dtype: str | None = None
    threads: int | None = None
    task: str | None = None
    acceptance_by_depth: Sequence[float] = ()
    num_plain_prompts: int | None = None
    num_identical: int | None = None

    def __post_init__(self) -> None:
        # A step emits the target's own token at least, so that a smaller tau is a mistake in counting.
        for name, least in {"temperature": 0, "tau": 1, "speedup": 0, "tokens_per_second": 0}.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(
                    f"expected {name} to be a finite number of at least {least}, got {value}: measure again."
                )
        # What is accepted to some depth is accepted to every smaller one.
        if not all(deeper <= share for share, deeper in pairwise([1.0, *self.acceptance_by_depth, 0.0])):
            raise ValueError(
                "expected acceptance_by_depth to be shares from 1 to 0 that never grow, got "
                f"{list(self.acceptance_by_depth)}: count the steps accepted to at least each depth."
            )

    @classmethod
    def from_records(cls, records: Sequence[AnswerRecord], **known: Any) -> Measurement:
        """Put measured answers together: those with the head as it is, and the plain ones to the same prompts.

        Args:
            records: Answers to prompts of one set at one temperature; those by other methods are passed over.
            **known: What no record tells: `machine`, `dtype`, `threads`; and `task`, by default that of the records if
                it is the same.

        Returns:
            The measurement over all of them.

        Raises:
            ValueError: If there is no answer with the head, or they are of several sets or temperatures.
        """
        pairs = pair_with_plain(records, FSPAD)
        runs = {(record.prompts, record.temperature) for record, _ in pairs}
        if len(runs) != 1:
            raise ValueError(
                f"expected answers with the head (method {FSPAD!r}) to one set of prompts at one temperature, got "
                f"{sorted(runs)}"
            )
        ((prompts, temperature),) = runs
        tasks = {record.task for record, _ in pairs}
        everything = Comparison([], [record.answer for record, _ in pairs])
        both = [(plain.answer, record.answer) for record, plain in pairs if plain is not None]
        comparison = Comparison([plain for plain, _ in both], [answer for _, answer in both])
        values = {
            "tau": everything.tau,
            "speedup": comparison.speedup if both else None,
            "tokens_per_second": everything.assisted_speed,
            "num_prompts": len(pairs),
            "task": tasks.pop() if len(tasks) == 1 else None,
            "acceptance_by_depth": everything.acceptance_by_depth,
            "num_plain_prompts": len(both) or None,
            "num_identical": comparison.num_identical if both else None,
        }
        return cls(prompts, temperature, **{**values, **known})

    @property
    def name(self) -> str:
        """Which prompts these are."""
        return self.prompts if self.task is None else f"{self.prompts}: {self.task}"

    @property
    def run(self) -> str:
        """What was measured, in a few words."""
        return f"{self.name}, {f'temperature {self.temperature:g}' if self.temperature else 'greedy'}"

    @property
    def is_partly_plain(self) -> bool:
        """Whether the speedup is that of fewer prompts than tau."""
        return self.num_plain_prompts not in (None, self.num_prompts)

    def eval_results(self) -> list[EvalResult]:
        """The entries of the model index: tau, and the speedup if it is known."""
        names = ("num_prompts", "dtype", "threads", "machine")
        known = [f"{name}={inline(value)}" for name in names if (value := getattr(self, name)) is not None]
        values = {name: value for name in METRICS if (value := getattr(self, name)) is not None}
        fewer = {"num_prompts": self.num_plain_prompts} if self.is_partly_plain else None
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"\W+", "-", self.name.lower()).strip("-") or "prompts",
                dataset_name=inline(self.name),
                # huggingface_hub puts results together that differ in nothing but name, arguments and metric.
                dataset_config=", ".join([f"temperature={self.temperature:g}", *known]),
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=round(float(value), 2),
                metric_args=fewer if metric == "speedup" else None,
            )
            for metric, value in values.items()
        ]


def summarize(records: Sequence[AnswerRecord], **known: Any) -> list[Measurement]:
    """Measurements of every set of prompts at every temperature, and of every task in it if there are several.

    Args:
        records: Measured answers; those by other methods than the head as it is and plain ones are passed over.
        **known: What no record tells: `machine`, `dtype`, `threads`.

    Returns:
        Whole sets in the order of their first answers, each before its tasks.
    """
    runs: dict[tuple[str, float], dict[str | None, list[AnswerRecord]]] = {}
    answered = {record.place for record in records if record.method == FSPAD}
    for record in records:
        if record.place not in answered:
            continue
        tasks = runs.setdefault((record.prompts, record.temperature), {})
        tasks.setdefault(record.task, []).append(record)
    measurements = []
    for tasks in runs.values():
        whole = [record for part in tasks.values() for record in part]
        measurements.append(Measurement.from_records(whole, **known))
        if len(tasks) > 1:
            measurements += [
                Measurement.from_records(part, **known) for task, part in tasks.items() if task is not None
            ]
    return measurements


def _speedup(measurement: Measurement) -> str | None:
    if measurement.speedup is None:
        return None
    note = f" ({count(measurement.num_plain_prompts)} prompts)" if measurement.is_partly_plain else ""
    return f"{measurement.speedup:.2f}x{note}"


def _identical(measurement: Measurement) -> str | None:
    if measurement.num_identical is None or measurement.num_plain_prompts is None:
        return None
    return f"{count(measurement.num_identical)} of {count(measurement.num_plain_prompts)}"


_RUN: dict[str, Callable[[Measurement], str | None]] = {
    "Prompts": lambda m: m.prompts,
    "Task": lambda m: m.task,
}
_RESULTS = {
    **_RUN,
    "Number": lambda m: count(m.num_prompts),
    "Temperature": lambda m: temperature(m.temperature),
    "tau": lambda m: f"{m.tau:.2f}",
    "Speedup": _speedup,
    "Tokens/s": lambda m: None if m.tokens_per_second is None else f"{m.tokens_per_second:.1f}",
    "Same as plain": _identical,
}
_SETUP: dict[str, Callable[[Measurement], str | None]] = {
    "Machine": lambda m: m.machine,
    "Dtype": lambda m: m.dtype,
    "Threads": lambda m: count(m.threads),
}


def results_table(measurements: Sequence[Measurement]) -> list[str]:
    """The lines of the table of results; machine, dtype and threads are columns only where they differ.

    Args:
        measurements: One row each.

    Returns:
        Lines of Markdown.
    """
    shared = _shared_setup(measurements)
    columns = {**_RESULTS, **{name: text for name, text in _SETUP.items() if name not in shared}}
    return table({name: [text(measurement) for measurement in measurements] for name, text in columns.items()})


def shared_setup(measurements: Sequence[Measurement]) -> str | None:
    """One line on what is the same for all rows of the table of results.

    Args:
        measurements: The rows.

    Returns:
        Machine, dtype and threads, or `None` if the rows have nothing of it in common.
    """
    shared = _shared_setup(measurements)
    return "; ".join(f"{name.lower()} {inline(text)}" for name, text in shared.items()) or None


def _shared_setup(measurements: Sequence[Measurement]) -> dict[str, str]:
    texts = {name: {text(measurement) for measurement in measurements} for name, text in _SETUP.items()}
    return {name: values.pop() for name, values in texts.items() if len(values) == 1 and None not in values}


def acceptance_table(measurements: Sequence[Measurement]) -> list[str]:
    """The lines of the table of acceptance by depth.

    Args:
        measurements: One row for each that tells it.

    Returns:
        Lines of Markdown.
    """
    measurements = [measurement for measurement in measurements if measurement.acceptance_by_depth]
    columns = {name: [text(measurement) for measurement in measurements] for name, text in _RUN.items()}
    columns["Temperature"] = [temperature(measurement.temperature) for measurement in measurements]
    for depth in range(max((len(measurement.acceptance_by_depth) for measurement in measurements), default=0)):
        shares = [measurement.acceptance_by_depth[depth : depth + 1] for measurement in measurements]
        columns[f"{depth + 1}"] = [f"{share[0]:.1%}" if share else None for share in shares]
    return table(columns)
