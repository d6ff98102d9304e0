"""`metrics.jsonl`: one JSON object per logged step, the numbers behind every curve."""

from __future__ import annotations

import json
import time

from infra.errors import InputError
from infra.storage import read_bytes, write_bytes
from training.loop import Callback, StepEvent
from training.state import TrainState

METRICS_NAME = "metrics.jsonl"
FLUSH_INTERVAL_S = 10.0


class MetricsFile(Callback):
    """Writes the whole file anew every few seconds, so that it is complete on object storage too.

    After a resume the lines beyond the checkpoint are dropped: the steps are taken again, and each has one line. So
    that none is missing either, everything is written before a checkpoint (`checkpoint_steps` apart) is.
    """

    def __init__(self, url: str, *, every_steps: int, checkpoint_steps: int) -> None:
        self._url = url
        self._checkpoint_steps = checkpoint_steps
        self._every_steps = every_steps
        self._lines: list[str] = []
        self._flushed_s = 0.0

    def at_start(self, state: TrainState) -> None:
        """Keep the lines of steps that the checkpoint contains."""
        self._lines = [line for line in _read_lines(self._url) if json.loads(line)["step"] <= state.step]

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Note the step if it is one to be logged."""
        if event.step % self._every_steps == 0 or event.step in (1, event.total_steps):
            self._note(event)
        due = event.step % self._checkpoint_steps == 0 or event.step == event.total_steps
        if due or time.monotonic() - self._flushed_s > FLUSH_INTERVAL_S:
            self._flush()

    def at_end(self, state: TrainState) -> None:
        """Write what is left."""
        self._flush()

    def _note(self, event: StepEvent) -> None:
        timing = {"step_s": event.step_s, "wait_s": event.wait_s}
        line = {"step": event.step, "epoch": event.epoch, **event.metrics, **timing}
        self._lines.append(json.dumps({key: _short(value) for key, value in line.items()}, allow_nan=False))

    def _flush(self) -> None:
        write_bytes(self._url, "".join(f"{line}\n" for line in self._lines).encode())
        self._flushed_s = time.monotonic()


def _short(value: float) -> float:
    """Seven digits: a float32 and no more."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _read_lines(url: str) -> list[str]:
    try:
        return read_bytes(url).decode().splitlines()
    except InputError:
        return []
