"""Pictures and a fixed-draw loss on held-out clips while a video model trains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from pydantic import Field
from torch import nn

from infra.config import Config
from infra.errors import ServiceError
from infra.storage import read_bytes
from training.callbacks.tracking import TrackingConfig
from training.loop import Callback, StepEvent
from training.previews import PreviewClip, write_previews
from training.protocols import VideoPredictor
from training.state import TrainState

log = logging.getLogger(__name__)

VALIDATION_LOSS = "validation_loss"
PREVIEWS = "previews"


class PreviewConfig(Config):
    """How often a video model in training is looked at; `every_steps` 0 turns it off.

    The validation loss averages `validation_draws` fixed pairs of sigma and noise over `validation_clips` clips.
    """

    every_steps: int = Field(default=2000, ge=0)
    num_clips: int = Field(default=4, ge=1)
    num_steps: int = Field(default=30, ge=1)
    guidance: tuple[float, float] = (1.0, 3.0)
    validation_clips: int = Field(default=32, ge=1)
    validation_draws: int = Field(default=4, ge=1)


class Previews(Callback):
    """After the first step, every `every_steps` and at the end: the loss; from the first interval on also pictures.

    The loss is added to the step's metrics, so this callback stands before those that write them down. `clips` gives
    the clips when they are first needed; no clips, no loss. A tracker that is away costs a warning, not the run.
    """

    def __init__(
        self,
        config: PreviewConfig,
        *,
        folder: str,
        predictor: Callable[[nn.Module], VideoPredictor],
        clips: Callable[[], tuple[Sequence[PreviewClip], Sequence[PreviewClip]]],
        tracking: TrackingConfig,
        seed: int,
    ) -> None:
        self.config = config
        self._folder = folder
        self._predictor = predictor
        self._find_clips = clips
        self._tracking = tracking
        self._seed = seed
        self._clips: tuple[Sequence[PreviewClip], Sequence[PreviewClip]] | None = None  # to show, to rate

    def after_step(self, event: StepEvent, state: TrainState) -> None:
        """Rate and show, when due."""
        due = event.step % self.config.every_steps == 0 or event.step == event.total_steps
        if not due and event.step != 1:
            return
        with _at_rest(state.model):
            predictor = self._predictor(state.model)
            self._rate(predictor, event)
            if due:
                self._show(predictor, event.step)

    def _rate(self, predictor: VideoPredictor, event: StepEvent) -> None:
        clips = self._found()[1]
        if not clips:
            return
        losses = [
            predictor.validation_losses(
                clip.frames[None],
                [clip.text],
                keys=[clip.key],
                num_draws=self.config.validation_draws,
                seed=self._seed,
            )
            for clip in clips
        ]
        event.metrics[VALIDATION_LOSS] = float(sum(float(loss[0]) for loss in losses) / len(losses))
        log.info("step %d: validation loss %.4f", event.step, event.metrics[VALIDATION_LOSS])

    def _show(self, predictor: VideoPredictor, step: int) -> None:
        clips = self._found()[0]
        urls = write_previews(
            self._folder,
            predictor,
            clips,
            name=f"step-{step:06d}",
            num_steps=self.config.num_steps,
            guidance=self.config.guidance,
            seed=self._seed,
        )
        self._attach(urls)

    def _found(self) -> tuple[Sequence[PreviewClip], Sequence[PreviewClip]]:
        if self._clips is None:
            self._clips = self._find_clips()
        return self._clips

    def _attach(self, urls: Sequence[str]) -> None:
        if not self._tracking.run_id:
            return
        from infra.tracking import Tracker

        run = Tracker(self._tracking.uri).open(self._tracking.run_id)
        try:
            for url in urls:
                run.log_bytes(read_bytes(url), f"{PREVIEWS}/{url.rpartition('/')[2]}")
        except ServiceError as error:
            log.warning("the previews stay in %s: %s", self._folder, error)


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """A predictor freezes its model; afterwards training finds it as it was."""
    training, trainable = model.training, [value for value in model.parameters() if value.requires_grad]
    try:
        yield
    finally:
        model.train(training)
        for value in trainable:
            value.requires_grad_(True)
