"""The plots of a report. Needs matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .plot_style import COLORS, STYLE, save
from .records import PLAIN
from .summary import Row

SPEEDUP = "speedup_by_task.png"
ACCEPTED = "accept_lengths.png"
TIME = "time_split.png"
EFFICIENCY = "efficiency_by_task.png"

# More tokens than that in one step are rare, and are counted together.
LONGEST = 10
_ALL = "all"
_PARTS = {"draft": "drafting", "steps": "steps of the target", "other": "other"}


def draw_plots(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw what the rows tell.

    Args:
        rows: What was measured.
        folder: Where to write the PNG files.

    Returns:
        Names of the files.
    """
    assisted = [row for row in rows if row.method != PLAIN]
    wholes = [row for row in rows if row.task is None]
    drawings = {
        SPEEDUP: (assisted, _draw_speedups, 1.0),
        ACCEPTED: ([row for row in wholes if row.comparison.accept_lengths], _draw_accept_lengths, 1.0),
        TIME: ([row for row in wholes if row.split is not None], _draw_time, 0.75),
        EFFICIENCY: ([row for row in assisted if row.comparison.efficiency is not None], _draw_efficiencies, 1.0),
    }
    for name, (drawn, draw, height) in drawings.items():
        if drawn:
            _draw_panels(drawn, draw, folder / name, height)
    return [name for name, (drawn, _, _) in drawings.items() if drawn]


def _draw_panels(
    rows: Sequence[Row], draw: Callable[[Axes, Sequence[Row], list[str]], None], path: Path, height: float
) -> None:
    """A panel for each temperature, in which each method has the same colour."""
    temperatures = sorted({row.temperature for row in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.5 + 3.2 * height * len(temperatures)))
        grid = figure.subplots(len(temperatures), squeeze=False)
        for temperature, axes in zip(temperatures, grid[:, 0], strict=True):
            draw(axes, [row for row in rows if row.temperature == temperature], methods)
            axes.set_title(f"temperature {temperature:g}" if temperature else "greedy", fontsize=10)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        save(figure, path)


def _draw_speedups(axes: Axes, rows: Sequence[Row], methods: list[str]) -> None:
    _draw_groups(axes, {(row.method, row.task or _ALL): row.mean for row in rows}, methods)
    axes.axhline(1, color="black", linewidth=1)  # plain generation
    axes.set_ylabel("Mean speedup")


def _draw_efficiencies(axes: Axes, rows: Sequence[Row], methods: list[str]) -> None:
    _draw_groups(axes, {(row.method, row.task or _ALL): row.comparison.efficiency for row in rows}, methods)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("Efficiency")


def _draw_accept_lengths(axes: Axes, rows: Sequence[Row], methods: list[str]) -> None:
    shares = {}
    for row in rows:
        for length, share in accept_length_shares(row.comparison.accept_lengths).items():
            shares[row.method, f"{length}" if length < LONGEST else f"{length} or more"] = share
    _draw_groups(axes, shares, methods, turned=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("Share of the steps")
    axes.set_xlabel("Tokens that a step emits")


def accept_length_shares(lengths: Sequence[int]) -> dict[int, float]:
    """How often steps emit each number of tokens.

    Args:
        lengths: Tokens of each step.

    Returns:
        Share of the steps by number from 1 to `LONGEST`, which stands for more too.
    """
    counts = Counter(min(length, LONGEST) for length in lengths)
    return {length: counts[length] / len(lengths) for length in range(1, LONGEST + 1)}


def _draw_groups(axes: Axes, values: dict[tuple[str, str], float], methods: list[str], turned: bool = True) -> None:
    """Bars of all methods side by side, group by group."""
    groups = list(dict.fromkeys(group for _, group in values))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        offset = (index - (len(methods) - 1) / 2) * width
        there = [(place, values[method, group]) for place, group in enumerate(groups) if (method, group) in values]
        axes.bar(
            [place + offset for place, _ in there],
            [value for _, value in there],
            width,
            label=method,
            color=COLORS[index % len(COLORS)],
            hatch="//" if index >= len(COLORS) else None,
        )
    axes.set_xticks(range(len(groups)), groups, **({"rotation": 20, "ha": "right"} if turned else {}))


def _draw_time(axes: Axes, rows: Sequence[Row], methods: list[str]) -> None:
    left = [0.0] * len(rows)
    for index, (name, label) in enumerate(_PARTS.items()):
        times = [1000 * getattr(row.split, name) for row in rows]
        color = COLORS[index] if name != "other" else "#BBBBBB"
        axes.barh([row.method for row in rows], times, left=left, label=label, color=color)
        left = [start + time for start, time in zip(left, times, strict=True)]
    axes.invert_yaxis()  # the first method on top
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Milliseconds per token")
