"""The report of a benchmark: a table, and plots where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markdown import count, inline, table, temperature
from .records import PLAIN, AnswerRecord
from .summary import Row, summarize_methods

REPORT = "report.md"
_EXPLANATION = """\
*Speedup* is tokens per second by those of plain `generate`, prefill included, of each question with all of its turns; the
table has mean, median and least of them. *tau* is the mean number of tokens per verification step, the target's own (bonus)
token included; plain decoding has 1. *Same as plain* counts the answers that plain `generate` gave token for token.

The shares of the time are drafting, steps of the target after the prefill, and all else. A head's step is the whole
verification; of other methods only the forward passes are known, and their drafting is in *Other*.

*Efficiency* is tokens per second by those of plain `generate`, of all questions together, by tau * t(1) / t(n + 1): the
speedup if nothing but the steps of the target took time, where t(1) is a step of plain decoding and t(n + 1) one that
verifies."""
_COLUMNS = {
    "Temperature": lambda row: temperature(row.temperature),
    "Task": lambda row: row.task or "all",
    "Method": lambda row: row.method,
    "Questions": lambda row: count(len(row.speedups)),
    "Tokens/s": lambda row: f"{row.comparison.assisted_speed:.1f}",
    "Speedup": lambda row: f"{row.mean:.2f}x",
    "Median": lambda row: f"{row.median:.2f}x",
    "Least": lambda row: f"{row.least:.2f}x",
    "tau": lambda row: f"{row.comparison.tau:.2f}",
    "Same as plain": lambda row: f"{row.comparison.num_identical} of {len(row.comparison.plain)}",
    "Drafting": lambda row: _share(row, "draft"),
    "Steps": lambda row: _share(row, "steps"),
    "Other": lambda row: _share(row, "other"),
    "Efficiency": lambda row: None if not row.comparison.efficiency else f"{row.comparison.efficiency:.0%}",
}
# Of plain generation they are what they are by definition.
_NOT_OF_PLAIN = ("Speedup", "Median", "Least", "Same as plain", "Efficiency")


def check_plots() -> None:
    """Check that plots can be drawn.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the plots of a report need matplotlib: `pip install "fspad[bench]"`')


def cells(row: Row) -> dict[str, str | None]:
    """What the table tells of a row.

    Args:
        row: The row.

    Returns:
        Texts by their headings; `None` for what is not known.
    """
    return {
        name: None if row.method == PLAIN and name in _NOT_OF_PLAIN else text(row) for name, text in _COLUMNS.items()
    }


def results_table(rows: Sequence[Row]) -> list[str]:
    """The table of a report.

    Args:
        rows: What was measured.

    Returns:
        Lines of Markdown.
    """
    texts = [cells(row) for row in rows]
    return table({name: [of_row[name] for of_row in texts] for name in _COLUMNS})


def write_report(records: Sequence[AnswerRecord], setup: Mapping[str, Any], folder: Path) -> Path:
    """Write table and plots.

    Args:
        records: What was measured.
        setup: What it depends on.
        folder: Where to write; made if it is not there.

    Returns:
        The file with the table, which shows the plots beside it.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no plain answers.
    """
    check_plots()
    from .plots import draw_plots

    rows = summarize_methods(records)
    folder.mkdir(parents=True, exist_ok=True)
    names = ", ".join(dict.fromkeys(inline(record.prompts) for record in records))
    facts = [f"- {name}: {_as_text(value)}" for name, value in setup.items() if value is not None]
    plots = [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in draw_plots(rows, folder)]
    parts = [f"# Benchmark: {names}", "\n".join(facts), "\n".join(results_table(rows)), _EXPLANATION, *plots]
    path = folder / REPORT
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _share(row: Row, name: str) -> str | None:
    split = row.split
    if split is None or (name == "draft" and not split.draft):
        return None
    return f"{getattr(split, name) / (split.draft + split.steps + split.other):.0%}"


def _as_text(value: Any) -> str:
    return inline(", ".join(map(str, value)) if isinstance(value, list) else value)
