"""Saves the run every so many steps and after the last one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from training.checkpoint import folder_name, write_checkpoint
from training.loop import Callback, StepEvent
from training.state import TrainState

# (local folder or None on ranks that do not write, name of the checkpoint, metrics): takes over the folder.
Publish = Callable[[Path | None, str, dict[str, float]], None]


class Checkpointing(Callback):
    """Writes a local folder on rank 0 and hands it to `publish`, which every rank calls at the same steps."""

    def __init__(self, publish: Publish, *, every_steps: int, rank: int) -> None:
        self._publish = publish
        self._every_steps = every_steps
        self._rank = rank
        self._saved_step = -1

    def at_start(self, state: TrainState) -> None:
        """What was resumed from need not be written again."""
        self._saved_step = state.step

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Save when due."""
        if event.step % self._every_steps == 0 or event.step == event.total_steps:
            self._save(state, event.metrics)

    def _save(self, state: TrainState, metrics: dict[str, float]) -> None:
        if state.step == self._saved_step:
            return
        folder = None
        if self._rank == 0:
            # Not a context manager: an asynchronous upload reads the folder after this call.
            folder = Path(tempfile.mkdtemp(prefix=f"{folder_name(state.step)}-"))
            write_checkpoint(folder, state)
        self._publish(folder, folder_name(state.step), metrics)
        self._saved_step = state.step
