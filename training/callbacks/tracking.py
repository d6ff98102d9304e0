"""Sends metrics to the experiment tracker in batches; does nothing without a run to send them to."""

from __future__ import annotations

from infra.config import Config
from training.loop import Callback


class TrackingConfig(Config):
    """The tracker's run that the caller has opened; empty: no tracking."""

    run_id: str = ""


class Tracking(Callback):
    """One request for many steps: a tracker must not slow a step down."""

    def __init__(self, config: TrackingConfig, *, every_steps: int) -> None:
        self._config = config
        self._every_steps = every_steps
