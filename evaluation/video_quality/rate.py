"""One batch of clips: the model's losses and predictions, its control arms, and what each is worth.

Shape letters: B clips, T frames, S side, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from evaluation.result import Item
from evaluation.video_quality.clips import LoadedClip
from evaluation.video_quality.config import AUTOENCODER, COPY_FIRST_FRAME, TRUE_FRAMES, VideoQualityConfig
from evaluation.video_quality.features import FeatureExtractor
from evaluation.video_quality.lpips import LPIPS
from evaluation.video_quality.metrics import Clip, change_cosine, moving_psnr, moving_region, psnr, ssim
from evaluation.video_quality.motion import HandProbe
from evaluation.video_quality.text import WrongArm
from infra.errors import DataError
from training.protocols import VideoPredictor

MODEL, ONE_STEP = "model", "one-step"
ONE_STEP_SUFFIX = "_one_step"
LOSS = "validation_loss"
Floats = npt.NDArray[np.floating]


@dataclass
class Rated:
    """Items of every arm and the features of every set, in the order of the clips."""

    items: dict[str, list[Item]] = field(default_factory=dict)
    features: dict[tuple[int, str], list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    artefacts: dict[str, str] = field(default_factory=dict)

    def add(self, arm: str, clip: LoadedClip, metrics: Mapping[str, float]) -> None:
        """Append one item, unless nothing of it was measured."""
        if metrics:
            chosen = clip.chosen
            item = Item(
                item_id=chosen.item_id, stratum=chosen.stratum, metrics=dict(metrics), details={"text": chosen.text}
            )
            self.items.setdefault(arm, []).append(item)


@dataclass(frozen=True)
class Rater:
    """Everything a batch is rated with."""

    config: VideoQualityConfig
    predictor: VideoPredictor
    extractors: Sequence[FeatureExtractor]
    lpips: LPIPS | None
    probes: Mapping[str, HandProbe]
    wrong: Sequence[WrongArm]

    def rate(self, batch: Sequence[LoadedClip], into: Rated) -> list[dict[str, Clip]]:
        """Append the batch's items and features; returns each clip's pictures by caption."""
        shown = self._predict(batch)
        losses = self._losses(batch, into)
        for index, clip in enumerate(batch):
            of_clip = {arm: videos[index] for arm, videos in shown.items()}
            worth = {arm: self._worth(clip, video) for arm, video in of_clip.items()}
            one_step = {f"{name}{ONE_STEP_SUFFIX}": value for name, value in worth[ONE_STEP].items()}
            into.add(MODEL, clip, {LOSS: losses[MODEL][index]} | worth[MODEL] | one_step)
            into.add(COPY_FIRST_FRAME, clip, {LOSS: losses[COPY_FIRST_FRAME][index]} | worth[COPY_FIRST_FRAME])
            into.add(AUTOENCODER, clip, worth[AUTOENCODER])
            into.add(TRUE_FRAMES, clip, self._motion(clip, clip.truth))
        self._add_features({TRUE_FRAMES: np.stack([clip.truth for clip in batch])} | shown, into)
        captions = {"copied": COPY_FIRST_FRAME, "1 step": ONE_STEP, f"{self.config.num_steps} steps": MODEL}
        captions["autoencoder"] = AUTOENCODER
        return [
            {"truth": clip.truth} | {caption: shown[arm][index] for caption, arm in captions.items()}
            for index, clip in enumerate(batch)
        ]

    def _predict(self, batch: Sequence[LoadedClip]) -> dict[str, Clip]:
        """(B, T, S, S, 3) of every arm."""
        config, predictor = self.config, self.predictor
        truth = np.stack([clip.truth for clip in batch])
        first, text = np.stack([clip.frames[0] for clip in batch]), [clip.chosen.text for clip in batch]
        many = predictor.predict(first, text, num_steps=config.num_steps, guidance=config.guidance, seed=config.seed)
        return {
            MODEL: many,
            ONE_STEP: predictor.predict(first, text, num_steps=1, guidance=config.guidance, seed=config.seed),
            COPY_FIRST_FRAME: np.repeat(truth[:, :1], truth.shape[1], axis=1),
            AUTOENCODER: predictor.reconstruct(np.stack([clip.frames for clip in batch])),
        }

    def _losses(self, batch: Sequence[LoadedClip], into: Rated) -> dict[str, list[float]]:
        """Losses of the model and of copying; those of the wrong sentences go straight to their arms."""
        right = [clip.chosen.text for clip in batch]
        losses = {
            MODEL: self._loss(batch, right),
            COPY_FIRST_FRAME: self._loss(batch, right, copy_first_frame=True),
        }
        for arm in self.wrong:
            others = [clip for clip in batch if clip.chosen.text in arm.sentences]
            if not others:
                continue
            wrong = self._loss(others, [arm.sentences[clip.chosen.text] for clip in others])
            for clip, loss in zip(others, wrong, strict=True):
                into.add(arm.name, clip, {LOSS: loss})
        return losses

    def _loss(self, clips: Sequence[LoadedClip], text: Sequence[str], *, copy_first_frame: bool = False) -> list[float]:
        values = self.predictor.validation_losses(
            np.stack([clip.frames for clip in clips]),
            text,
            keys=[clip.chosen.item_id for clip in clips],
            num_draws=self.config.num_draws,
            seed=self.config.seed,
            copy_first_frame=copy_first_frame,
        )
        for clip, value in zip(clips, values, strict=True):
            if not np.isfinite(value):
                raise DataError(
                    f"the model's validation loss of clip {clip.chosen.item_id} is {value}.",
                    remedy="Its weights are broken: evaluate an earlier checkpoint.",
                )
        return [float(value) for value in values]

    def _worth(self, clip: LoadedClip, video: Clip) -> dict[str, float]:
        """Pixel metrics of one predicted clip; those that the truth leaves undefined are absent."""
        start = self._start
        truth, shown = clip.truth[start:], video[start:]
        region = moving_region(clip.truth, threshold=self.config.moving_threshold)[start:]
        found: dict[str, float | None] = {
            "psnr": psnr(truth, shown),
            "ssim": ssim(truth, shown),
            "moving_psnr": moving_psnr(truth, shown, region),
            "change_cosine": change_cosine(clip.truth, video),
        }
        if self.lpips is not None:
            found["lpips"] = float(self.lpips(torch.from_numpy(truth), torch.from_numpy(shown)).mean())
        return {name: value for name, value in found.items() if value is not None} | self._motion(clip, video)

    def _motion(self, clip: LoadedClip, video: Clip) -> dict[str, float]:
        probe = self.probes.get(self.config.sources[clip.chosen.source].name)
        if probe is None or clip.hand is None:
            return {}
        return {"motion_error_m": probe.error_m(video[self._start :], clip.hand[self._start :])}

    def _add_features(self, videos: Mapping[str, Clip], into: Rated) -> None:
        for number, extractor in enumerate(self.extractors):
            for arm, clips in videos.items():
                into.features.setdefault((number, arm), []).append(extractor.features(clips[:, self._start :]))

    @property
    def _start(self) -> int:
        """The first frame that counts."""
        return 0 if self.config.include_first_frame else 1
