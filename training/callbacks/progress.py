"""The log line of a run: where it is, how fast, when it ends, and whether it waits for data."""

from __future__ import annotations

import logging
import time
from collections import deque

from training.loop import Callback, StepEvent
from training.state import TrainState

log = logging.getLogger(__name__)

WINDOW_STEPS = 50
MUCH_WAITING = 0.2


class Progress(Callback):
    """One line every `interval_s` seconds, and a word of advice at the end if the loader was the bottleneck."""

    def __init__(self, *, interval_s: float = 10.0) -> None:
        self._interval_s = interval_s
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)  # (step_s, wait_s)
        self._logged_s = 0.0
        self._total_s = self._waited_s = 0.0

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Log if it is time, and after the last step."""
        self._recent.append((event.step_s, event.wait_s))
        self._total_s += event.step_s
        self._waited_s += event.wait_s
        if time.monotonic() - self._logged_s < self._interval_s and event.step != event.total_steps:
            return
        self._logged_s = time.monotonic()
        step_s = sum(step for step, _ in self._recent) / len(self._recent)
        log.info(
            "step %d/%d  pass %.2f  loss %.4f  lr %.2e  %.3f s/step  %.0f clips/s  waiting %.0f %%  %s left",
            *(event.step, event.total_steps, event.epoch, event.metrics["loss"], event.metrics["lr"]),
            *(step_s, event.num_clips / step_s, 100 * self.wait_share(), _clock(step_s, event)),
        )

    def at_end(self, state: TrainState) -> None:
        """Say so if data were the bottleneck."""
        if self._total_s and self._waited_s / self._total_s > MUCH_WAITING:
            share = 100 * self._waited_s / self._total_s
            log.warning("%.0f %% of the time went into waiting for data; raise compute.loader_workers", share)

    def wait_share(self) -> float:
        """Share of the recent steps' time spent waiting for data."""
        total = sum(step for step, _ in self._recent)
        return sum(wait for _, wait in self._recent) / total if total else 0.0


def _clock(step_s: float, event: StepEvent) -> str:
    minutes, seconds = divmod(round(step_s * (event.total_steps - event.step)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
