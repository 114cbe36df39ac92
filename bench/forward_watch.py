"""How long a target's forward passes take, whoever calls them: nothing that generates reports that by itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fspad.timing import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ForwardWatch:
    """Times the forward passes of a target inside of a `with` block.

    Args:
        target: The model.

    Attributes:
        prefill: Time of the first forward pass.
        steps: Time of all others.
        num_forwards: How many there were. None are seen of a wrapper that calls the model inside of it, as PEFT does.
    """

    def __init__(self, target: PreTrainedModel):
        self.target = target
        self.prefill, self.steps = Stopwatch(target.device), Stopwatch(target.device)
        self._num_layers = self._layers()
        self.num_forwards = 0
        self._running: AbstractContextManager[None] | None = None

    def __enter__(self) -> ForwardWatch:
        self._handles = (
            self.target.register_forward_pre_hook(self._start),
            self.target.register_forward_hook(self._stop),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _layers(self) -> int | None:
        return getattr(self.target.base_model.config, "num_hidden_layers", None)

    def _start(self, *args: Any) -> None:
        # A target that exits early drafts with its own first layers: these are no steps
        if self._layers() != self._num_layers:
            return
        self._running = (self.steps if self.num_forwards else self.prefill).running()
        self._running.__enter__()
        self.num_forwards += 1

    def _stop(self, *args: Any) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None
