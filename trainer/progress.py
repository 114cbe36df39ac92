"""How far work is that goes through rows of tokens: a bar on a terminal, else lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# Where lines are written, one for so many seconds
_SECONDS_A_LINE = 10.0
# The speed is that of the last minute, or of the last few batches where these take longer
_RECENT_SECONDS = 60.0
_RECENT_BATCHES = 5


@contextmanager
def show_progress(title: str, total: int, completed: int) -> Iterator[Callable[[int, int], None]]:
    """Show how far the work in the `with` block is.

    Args:
        title: What the rows are.
        total: How many rows there are.
        completed: How many of them were done before.

    Yields:
        A function that takes how many rows and how many tokens are new.
    """
    console = Console()
    show = _show_bar if console.is_interactive or console.is_jupyter else _show_lines
    pace = _Pace(total, completed)
    with show(console, title, pace) as refresh:

        def advance(rows: int, tokens: int) -> None:
            pace.add(rows, tokens)
            refresh()

        yield advance


class _Pace:
    """Counts rows and tokens as they are done, and how fast.

    Args:
        total: How many rows there are.
        completed: How many of them were done before; they say nothing of the speed.
    """

    def __init__(self, total: int, completed: int):
        self.total = total
        self.completed = completed
        self._tokens = 0
        self._marks = deque([(time.monotonic(), completed, 0)])

    def add(self, rows: int, tokens: int) -> None:
        self.completed += rows
        self._tokens += tokens
        now = time.monotonic()
        self._marks.append((now, self.completed, self._tokens))
        while len(self._marks) > _RECENT_BATCHES + 1 and self._marks[1][0] <= now - _RECENT_SECONDS:
            self._marks.popleft()

    def describe(self) -> str:
        """Tokens a second, and the time that is left; nothing as long as nothing is known."""
        seconds, rows, tokens = (last - first for first, last in zip(self._marks[0], self._marks[-1], strict=True))
        if seconds <= 0:
            return ""
        speed = f"{tokens / seconds:.0f} tokens/s"
        if rows == 0:
            return speed
        return f"{speed}, {timedelta(seconds=round((self.total - self.completed) * seconds / rows))} left"


@contextmanager
def _show_bar(console: Console, title: str, pace: _Pace) -> Iterator[Callable[[], None]]:
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}")]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=pace.total, completed=pace.completed, pace="")
        yield lambda: progress.update(task, completed=pace.completed, pace=pace.describe())


@contextmanager
def _show_lines(console: Console, title: str, pace: _Pace) -> Iterator[Callable[[], None]]:
    written, written_at = "", time.monotonic()

    def write() -> None:
        nonlocal written, written_at
        line = ", ".join(filter(None, (f"{title}: {pace.completed}/{pace.total}", pace.describe())))
        if line != written:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        written, written_at = line, time.monotonic()

    def refresh() -> None:
        if time.monotonic() - written_at >= _SECONDS_A_LINE:
            write()

    try:
        yield refresh
    finally:
        write()
