"""How a policy does on held-out decisions while it trains: a fixed-draw loss and the error of sampled actions.

Both are means over the same decisions with the same draws at every look, so the curve moves with the weights alone
(VPP's own validation loss is drawn anew each time: its issue 17). Where a weight average is kept, it is rated too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import nn

from infra.config import Config
from training.loop import Callback, StepEvent
from training.optim import WeightAverage
from training.state import TrainState

log = logging.getLogger(__name__)

Rate = Callable[[nn.Module], dict[str, float]]


class PolicyValidationConfig(Config):
    """Every `every_steps` (0: never), at the first and at the last step, on `decisions` of the held-out episodes."""

    every_steps: int = Field(default=1000, ge=0)
    decisions: int = Field(default=256, ge=1)
    batch_size: int = Field(default=64, ge=1)


class PolicyValidation(Callback):
    """Adds `validation_...` to the step's metrics, so it stands before the callbacks that write them down."""

    def __init__(self, config: PolicyValidationConfig, rate: Rate) -> None:
        self._config, self._rate = config, rate

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Rate the weights, and their average if there is one, when due."""
        due = event.step % self._config.every_steps == 0 or event.step in (1, event.total_steps)
        if not due:
            return
        with _at_rest(state.model):
            event.metrics |= {f"validation_{name}": value for name, value in self._rate(state.model).items()}
            if state.average is not None:
                with _averaged(state.model, state.average):
                    found = self._rate(state.model)
                event.metrics |= {f"validation_average_{name}": value for name, value in found.items()}
        shown = ", ".join(f"{k} {v:.4f}" for k, v in event.metrics.items() if k.startswith("validation_"))
        log.info("step %d: %s", event.step, shown)


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _averaged(model: nn.Module, average: WeightAverage) -> Iterator[None]:
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if name in average.weights}
    average.copy_to(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in kept:
                    value.copy_(kept[name])
