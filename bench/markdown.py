"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def count(number: int | None) -> str | None:
    """A number with separators; `None` stays unknown."""
    return None if number is None else f"{number:,}"


def inline(value: Any) -> str:
    """Text in one line, since a line break would end a row or an item."""
    return " ".join(str(value).split())


def temperature(value: float) -> str:
    """A temperature, at which 0 is greedy decoding."""
    return f"{value:g}" if value else "0 (greedy)"


def table(columns: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Lines of a table without the columns that no row fills.

    Args:
        columns: The cells of each column, by its heading.

    Returns:
        The lines; none if there is nothing in the table.
    """
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    rows = zip(*columns.values(), strict=True)
    cells = [[inline(cell or "").replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (list(columns), ["---"] * len(columns), *cells)] if cells else []
