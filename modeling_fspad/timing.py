"""Seconds spent in a part of the decoding loop, by device events where work is queued on an accelerator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of `with` blocks without waiting for the device inside of them.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []
        # Of the last block on the host's clock: true for blocks that begin and end with a wait for the device
        self.last = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of this block."""
        has_events = self.device.type in ("cuda", "xpu")
        start_time = time.perf_counter()
        if has_events:
            start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            start.record()
        yield
        self.last = time.perf_counter() - start_time
        if has_events:
            end.record()
            self._events.append((start, end))
        else:
            self._seconds += self.last

    def seconds(self) -> float:
        """The sum so far; waits for the device once."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds
