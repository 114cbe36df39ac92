"""A bar on the terminal for work that goes through rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def show_progress(title: str, total: int, completed: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the `with` block runs.

    Args:
        title: What the rows are.
        total: How many rows there are.
        completed: How many of them were done before.

    Yields:
        A function that takes how many rows and how many tokens are new.
    """
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[speed]:.0f} tokens/s"))
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=total, completed=completed, speed=0.0)
        tokens = 0

        def advance(rows: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            progress.update(task, advance=rows, speed=tokens / (progress.tasks[task].elapsed or 1.0))

        yield advance
