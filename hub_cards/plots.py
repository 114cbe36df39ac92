"""The plots of a card, all in one style. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fspad.bench.plot_style import COLORS, STYLE, save

from .measurement import Measurement
from .training import Evaluation

if TYPE_CHECKING:
    from .model_card import FSPADModelCard

ACCEPTANCE = "acceptance_by_depth.png"
TRAINING = "training.png"

# They tell the lines apart without any colour.
MARKERS = "os^Dv<>"
MOST_MARKERS = 15
LINES = ("-", "--", ":", "-.")


def draw_plots(card: FSPADModelCard, folder: Path) -> list[str]:
    """Draw what the card has curves for.

    Args:
        card: The card.
        folder: Where to write the PNG files.

    Returns:
        Names of the files.
    """
    evaluations = () if card.training is None else card.training.evaluations
    drawn = {
        ACCEPTANCE: draw_acceptance(card.measurements, folder / ACCEPTANCE),
        TRAINING: draw_training(evaluations, folder / TRAINING),
    }
    return [name for name, is_drawn in drawn.items() if is_drawn]


def draw_acceptance(measurements: Sequence[Measurement], path: Path) -> bool:
    """Draw how often drafts are accepted to each depth: a colour for each set of prompts, a dash for each temperature.

    Args:
        measurements: Those that tell it are drawn; of a set that was measured as a whole, the whole alone.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.
    """
    measurements = [measurement for measurement in measurements if measurement.acceptance_by_depth]
    wholes = {measurement.prompts for measurement in measurements if measurement.task is None}
    measurements = [m for m in measurements if m.task is None or m.prompts not in wholes]
    if not measurements:
        return False
    runs = list(dict.fromkeys((measurement.prompts, measurement.task) for measurement in measurements))
    temperatures = sorted({measurement.temperature for measurement in measurements})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4))
        axes = figure.subplots()
        for measurement in measurements:
            shares = measurement.acceptance_by_depth
            _draw_line(
                axes,
                range(1, len(shares) + 1),
                shares,
                measurement.run,
                runs.index((measurement.prompts, measurement.task)),
                temperatures.index(measurement.temperature),
            )
        axes.set_xlabel("Depth in the draft (tokens)")
        axes.set_ylabel("Steps accepted to at least this depth")
        _show_shares(axes)
        axes.legend()
        save(figure, path)
    return True


def draw_training(evaluations: Sequence[Evaluation], path: Path) -> bool:
    """Draw tau and accuracy over the training, each if it was measured at two steps or more.

    Args:
        evaluations: What was measured in training.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.
    """
    panels: list[Callable[[Axes, Sequence[Evaluation]], None]] = []
    if len({evaluation.step for evaluation in evaluations if evaluation.tau is not None}) > 1:
        panels.append(_draw_tau)
    if len({evaluation.step for evaluation in evaluations if evaluation.accuracies}) > 1:
        panels.append(_draw_accuracy)
    if not panels:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.6 + 2.8 * len(panels)))
        grid = figure.subplots(len(panels), sharex=True, squeeze=False)
        for draw, axes in zip(panels, grid[:, 0], strict=True):
            draw(axes, evaluations)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1, 0].set_xlabel("Optimizer steps")
        figure.align_ylabels()
        save(figure, path)
    return True


def _draw_tau(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    names = _names(evaluation for evaluation in evaluations if evaluation.tau is not None)
    for index, name in enumerate(names):
        points = [(e.step, e.tau) for e in evaluations if e.dataset == name and e.tau is not None]
        _draw_line(axes, *zip(*points, strict=True), name, index)
    axes.set_ylim(bottom=1)  # plain decoding
    axes.set_ylabel("tau (tokens per step of the target)")
    if len(names) > 1:
        axes.legend()


def _draw_accuracy(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    names = _names(evaluation for evaluation in evaluations if evaluation.accuracies)
    for index, name in enumerate(names):
        curves = [evaluation for evaluation in evaluations if evaluation.dataset == name]
        for depth in range(max(len(evaluation.accuracies) for evaluation in curves)):
            points = [(e.step, e.accuracies[depth]) for e in curves if e.accuracies[depth:]]
            label = f"depth {depth + 1}" if len(names) == 1 else f"{name}, depth {depth + 1}"
            _draw_line(axes, *zip(*points, strict=True), label, depth, index)
    axes.set_ylabel("Accuracy of the head's first choice")
    _show_shares(axes)
    # Beside the curves, which fill the whole height.
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _names(evaluations: Iterable[Evaluation]) -> list[str | None]:
    return list(dict.fromkeys(evaluation.dataset for evaluation in evaluations))


def _draw_line(
    axes: Axes, x: Sequence[float], y: Sequence[float], label: str | None, color: int, dash: int = 0
) -> None:
    axes.plot(
        x,
        y,
        label=label,
        color=COLORS[color % len(COLORS)],
        marker=MARKERS[color % len(MARKERS)],
        markevery=max(1, len(x) // MOST_MARKERS),
        linestyle=LINES[dash % len(LINES)],
        clip_on=False,
    )


def _show_shares(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
