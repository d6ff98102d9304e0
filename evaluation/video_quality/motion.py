"""Where is the hand in a picture: a ridge probe from pixels to metres, fitted on true training frames.

The probe measures a predicted video in the simulator's own units. It is no better than its error on true frames,
which is reported as the floor. Shape letters: N frames, T frames of a clip, S side, D reduced pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from evaluation.video_quality.clips import ClipSet
from evaluation.video_quality.config import ProbeConfig
from evaluation.video_quality.metrics import Clip
from infra.errors import InputError
from ingest.windows import ClipSource

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
HELD_OUT_EVERY = 5
MIN_CLIPS = 2


@dataclass(frozen=True)
class HandProbe:
    """position = (reduced pixels - `pixel_mean`) @ `weights` + `position_mean`."""

    weights: Floats  # (D, 3)
    pixel_mean: Floats  # (D,)
    position_mean: Floats  # (3,)
    side: int

    def positions(self, frames: Clip) -> Floats:
        """(T, S, S, 3) uint8 -> (T, 3) metres."""
        return (reduce(frames, self.side) - self.pixel_mean) @ self.weights + self.position_mean

    def error_m(self, frames: Clip, hand: Floats) -> float:
        """Mean distance in metres between the positions read off T frames and the true ones (T, 3)."""
        return float(np.linalg.norm(self.positions(frames) - hand, axis=1).mean())


def fit_probe(clips: Sequence[Clip], hands: Sequence[Floats], config: ProbeConfig) -> HandProbe:
    """Ridge regression on all frames of the clips; the penalty is the one with the least error on every fifth clip.

    A penalty is relative to the mean squared length of a centred picture. Raises `InputError` for fewer than 2 clips.
    """
    if len(clips) < MIN_CLIPS:
        raise InputError(f"a position probe of {len(clips)} clips.", remedy="Give at least 2 training clips.")
    pixels = [reduce(clip, config.side) for clip in clips]
    held_out = range(0, len(clips), HELD_OUT_EVERY)
    fitted = [index for index in range(len(clips)) if index not in held_out]
    candidates = _ridge(_joined(pixels, fitted), _joined(hands, fitted), config)
    test_pixels, test_hands = _joined(pixels, held_out), _joined(hands, held_out)

    def error(penalty: float) -> float:
        probe = candidates[penalty]
        guess = (test_pixels - probe.pixel_mean) @ probe.weights + probe.position_mean
        return float(np.linalg.norm(guess - test_hands, axis=1).mean())

    best = min(config.penalties, key=error)
    everything = range(len(clips))
    chosen = config.model_copy(update={"penalties": (best,)})
    log.info("position probe: penalty %g, %.4f m on held-out training clips", best, error(best))
    return _ridge(_joined(pixels, everything), _joined(hands, everything), chosen)[best]


def fit_probes(config: ProbeConfig, sources: Sequence[ClipSource], *, size: int) -> tuple[dict[str, HandProbe], object]:
    """(probe of each source by name, what they rest on); sources that record no hand position have none.

    Every source has its own: cameras and robots differ.
    """
    if not config.max_frames:
        return {}, None
    probes: dict[str, HandProbe] = {}
    rests_on: list[object] = []
    for source in config.sources or [source.model_copy(update={"split": config.split}) for source in sources]:
        try:
            clips = ClipSet([source])
        except InputError as error:
            if config.sources:
                raise
            log.info("no motion error for source %s: %s", source.name, error)
            continue
        if probe := _probe_of(clips, config, size=size):
            probes[source.name] = probe
            rests_on += clips.describe_sources()
    return probes, rests_on


def reduce(frames: Clip, side: int) -> Floats:
    """(T, S, S, 3) uint8 -> (T, D) in [0, 1], pictures averaged down to at most `side` pixels a side."""
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).double() / 255.0
    if max(pictures.shape[2:]) > side:
        pictures = F.adaptive_avg_pool2d(pictures, (side, side))
    return pictures.flatten(1).numpy()


def _probe_of(clips: ClipSet, config: ProbeConfig, *, size: int) -> HandProbe | None:
    pictures: list[Clip] = []
    hands: list[Floats] = []
    count = 0
    for chosen in clips.chosen:
        hand = clips.hand(chosen)
        if hand is None:
            log.info("no motion error for source %s: %s has no hand positions", clips.sources[0].name, chosen.item_id)
            return None
        if count + len(hand) > config.max_frames and len(hands) >= MIN_CLIPS:
            break
        pictures.append(clips.load(chosen, size=size).truth)
        hands.append(hand)
        count += len(hand)
    if len(hands) < MIN_CLIPS:
        log.info("no motion error for source %s: %d training clip", clips.sources[0].name, len(hands))
        return None
    return fit_probe(pictures, hands, config)


def _ridge(pixels: Floats, hands: Floats, config: ProbeConfig) -> dict[float, HandProbe]:
    """A probe for each penalty, from one eigendecomposition of the frames' inner products."""
    pixel_mean, position_mean = pixels.mean(axis=0), hands.mean(axis=0)
    centred, targets = pixels - pixel_mean, hands - position_mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values, 0.0)
    scale = max(float(values.sum()) / len(values), 1e-12)
    rotated = vectors.T @ targets
    probes = {}
    for penalty in config.penalties:
        dual = vectors @ (rotated / (values + penalty * scale)[:, None])
        probes[penalty] = HandProbe(centred.T @ dual, pixel_mean, position_mean, config.side)
    return probes


def _joined(parts: Sequence[Floats], chosen: Sequence[int]) -> Floats:
    return np.concatenate([parts[index] for index in chosen])
