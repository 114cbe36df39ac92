"""One style for all plots. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "grid.color": "#DDDDDD",
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 1,  # no grid behind the text
    "legend.handlelength": 3.2,  # long enough to tell dashes apart
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, without the version of matplotlib, so that the same figures give the same file.

    Args:
        figure: The figure.
        path: The file.
    """
    figure.savefig(path, metadata={"Software": None})
