"""Frozen features of every frame of an episode data set, computed once before a policy is trained on them.

Shape letters: F frames of all episodes in order, T frames of one episode or history, N tokens, D width, B windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ingest.reader import ShardDataset
from training.data.episodes import Episode, WindowBatch, iter_frames
from training.models.common.frozen import FeatureKind, frame_features
from training.protocols import Encoder

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EpisodeFeatures:
    """Features of F frames: `rows` (F, D) class tokens or (F, N, D) patch tokens, `lengths` in frames per episode."""

    rows: torch.Tensor
    lengths: tuple[int, ...]
    digest: str  # of the encoder that made them

    def per_episode(self) -> list[Floats]:
        """One (T, D) or (T, N, D) array per episode."""
        return [part.float().numpy() for part in self.rows.split(self.lengths)]

    def windows(self, batch: WindowBatch, offsets: Sequence[int] = (0,)) -> torch.Tensor:
        """(B, len(offsets), ...) float32 features at frame + offset, clamped at the episode's first frame."""
        frames = batch.frames[:, None] + torch.tensor(offsets)
        first_rows = batch.feature_rows - batch.frames
        return self.rows[first_rows[:, None] + frames.clamp(min=0)].float()


def compute_features(
    dataset: ShardDataset,
    episodes: Sequence[Episode],
    encoder: Encoder,
    *,
    kind: FeatureKind,
    camera: str | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeFeatures:
    """Encode every frame once, in episode order. `progress(done, total)` counts frames.

    `dtype` float16 halves the memory of patch tokens: F * N * D values.
    """
    lengths = tuple(episode.num_frames for episode in episodes)
    total, done = sum(lengths), 0
    rows: torch.Tensor | None = None
    for frames in iter_frames(dataset, episodes, batch_size=batch_size, camera=camera):
        features = frame_features(encoder, frames, kind, batch_size=batch_size).to(dtype)
        if rows is None:
            rows = torch.empty((total, *features.shape[1:]), dtype=dtype)
        rows[done : done + len(features)] = features
        done += len(features)
        if progress is not None:
            progress(done, total)
    log.info("encoded %d frames of %d episodes with encoder %s", total, len(episodes), encoder.digest[:12])
    return EpisodeFeatures(torch.empty(0, 0) if rows is None else rows, lengths, encoder.digest)
