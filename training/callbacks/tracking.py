"""Sends metrics to the experiment tracker; does nothing without a run to send them to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.config import Config
from training.loop import Callback, StepEvent
from training.state import TrainState

if TYPE_CHECKING:
    from infra.tracking import TrackedRun


FLUSH_TIMEOUT_S = 10.0  # a tracker that is away at the end costs no more


class TrackingConfig(Config):
    """The tracker's run that the caller has opened and will finish; empty: no tracking."""

    run_id: str = ""
    uri: str = ""  # empty: the one of the settings


class Tracking(Callback):
    """Numbers go through the tracker's own queue: a slow or absent server does not slow a step."""

    def __init__(self, config: TrackingConfig, *, every_steps: int) -> None:
        self._config = config
        self._every_steps = every_steps
        self._run: TrackedRun | None = None

    def at_start(self, state: TrainState) -> None:
        """Open the run; nobody is contacted yet."""
        if not self._config.run_id:
            return
        from infra.tracking import Tracker

        self._run = Tracker(self._config.uri).open(self._config.run_id)

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Queue the step's metrics if it is one to be logged."""
        due = event.step % self._every_steps == 0 or event.step in (1, event.total_steps)
        if self._run is not None and due:
            numbers = {**event.metrics, "epoch": event.epoch, "step_s": event.step_s, "wait_s": event.wait_s}
            self._run.log_metrics({f"train/{name}": value for name, value in numbers.items()}, step=event.step)

    def at_end(self, state: TrainState) -> None:
        """Wait a moment for what is queued."""
        if self._run is not None:
            self._run.flush(timeout_s=FLUSH_TIMEOUT_S)
