"""Carrying first-frame labels through a video with frozen features.

Two published styles (DINO's video segmentation, CRW) that differ in context, window and ties:

    style   contexts of frame t                        window                                     ties at the k-th
    dino    first frame + up to `queue` latest frames  square, |di|, |dj| <= radius, everywhere   all kept
    crw     first frame + `queue` latest, the first    distance < radius, not for the first       k kept
            frame standing in for those before it

The affinity of a frame to all its contexts is never held: queries go in tiles, only keys inside a tile's window are
multiplied, and the k best are found before anything is exponentiated. Beyond features and labels a call holds the
normalised features of the contexts and about CHUNK_BYTES of scores.

Shape letters: T frames, H and W grid, D width, C label channels, Q queries of a tile, K key places of its window,
N contexts, M candidates.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.nn import functional

from infra.config import Config
from infra.errors import InputError

Array = TypeVar("Array", npt.NDArray[np.generic], torch.Tensor)
_Frame = tuple[torch.Tensor, torch.Tensor]  # normalised features (HW, D) and soft labels (HW, C)
CHUNK_BYTES = 24 << 20  # scores of one tile of queries against every context
MAX_TILE = 128  # queries; larger tiles see more keys outside the window of most of their queries
TWO_STAGE_FROM = 3  # contexts


class PropagationConfig(Config):
    """How labels travel; defaults are RSP's for DAVIS-2017 (Table 5b), the temperature that of its code."""

    style: Literal["dino", "crw"] = "dino"
    top_k: int = Field(default=7, ge=1)
    radius: float = Field(default=30, ge=0)  # grid cells
    queue: int = Field(default=30, ge=0)  # latest frames beside the first
    temperature: float = Field(default=0.1, gt=0)


@dataclass(frozen=True)
class _Tile:
    """Queries [start, stop) and the key places [key_start, key_stop) any of them may look at, as flat grid cells."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    outside: torch.Tensor | None  # (Q, K): 0 inside the window, -inf outside; None when all is inside


def propagate(features_THWD: Array, first_labels_HWC: Array, config: PropagationConfig) -> Array:
    """Soft labels (T - 1, H, W, C) of every frame but the given first one; arrays in, arrays out.

    Features need not be normalised. `first_labels_HWC` is usually one-hot on the feature grid, channel 0 background.
    """
    features = torch.as_tensor(features_THWD).detach().to("cpu", torch.float32)
    labels = torch.as_tensor(first_labels_HWC).detach().to("cpu", torch.float32)
    if features.ndim != 4 or labels.ndim != 3 or features.shape[1:3] != labels.shape[:2]:
        raise InputError(
            f"features {tuple(features.shape)} and first labels {tuple(labels.shape)} do not share a grid.",
            remedy="Give (T, H, W, D) and (H, W, C).",
        )
    # Keys of neighbouring lines are one contiguous block, so the longer side comes first: a window cuts more of it.
    turned = features.shape[1] < features.shape[2]
    if turned:
        features, labels = features.transpose(1, 2), labels.transpose(0, 1)
    soft = _propagate_lines(features, labels.contiguous(), config)
    soft = soft.transpose(1, 2).contiguous() if turned else soft
    return soft.numpy() if isinstance(features_THWD, np.ndarray) else soft


def harden(soft: Array, patch_size: int) -> Array:
    """Soft labels (T - 1, H, W, C) -> label maps (T - 1, H * patch_size, W * patch_size), uint8.

    Bilinear enlargement (pixel centres), then each channel of each frame is stretched to [0, 1] by its own minimum
    and maximum, then the largest channel wins. A channel without positive values is left alone.
    """
    maps = torch.as_tensor(soft).detach().to("cpu", torch.float32)
    if maps.ndim != 4 or patch_size < 1 or maps.shape[-1] > 255:
        raise InputError(f"soft labels {tuple(maps.shape)}, patch size {patch_size}: cannot be hardened.")
    frames = [_harden_frame(frame.permute(2, 0, 1), patch_size) for frame in maps]
    empty = torch.empty((0, maps.shape[1] * patch_size, maps.shape[2] * patch_size), dtype=torch.uint8)
    hard = torch.stack(frames) if frames else empty
    return hard.numpy() if isinstance(soft, np.ndarray) else hard


def _harden_frame(soft_CHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    large = functional.interpolate(soft_CHW[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    # A constant positive channel becomes 0/0, which argmax ranks highest: it wins everywhere, as in the reference.
    shifted = large - low
    stretched = torch.where(high > 0, shifted / shifted.amax(dim=(1, 2), keepdim=True), large)
    return stretched.argmax(dim=0).to(torch.uint8)


def _propagate_lines(features: torch.Tensor, labels: torch.Tensor, config: PropagationConfig) -> torch.Tensor:
    num_frames, height, width, _ = features.shape
    num_contexts = config.queue + 1 if config.style == "crw" else min(config.queue + 1, max(1, num_frames - 1))
    tiles = list(_tiles(height, width, num_contexts, config))
    scores = _Scores(tiles, num_contexts)
    first = _normalised(features[0]), labels.reshape(height * width, -1)
    latest: deque[_Frame] = deque(maxlen=config.queue)
    if config.style == "crw":
        latest.extend([first] * config.queue)
    soft = features.new_empty((max(0, num_frames - 1), height * width, labels.shape[-1]))
    for frame in range(1, num_frames):
        queries = _normalised(features[frame])
        contexts = (first, *latest)
        for tile in tiles:
            here = slice(tile.start, tile.stop)
            soft[frame - 1, here] = _tile_labels(queries[here], tile, contexts, scores, config)
        latest.append((queries, soft[frame - 1]))
    return soft.reshape(-1, height, width, labels.shape[-1])


def _normalised(features_HWD: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features_HWD.reshape(-1, features_HWD.shape[-1]), dim=-1)


def _tiles(height: int, width: int, num_contexts: int, config: PropagationConfig) -> Iterator[_Tile]:
    """Cut the flat grid of queries so that a tile's scores against every context stay within CHUNK_BYTES."""
    reach = int(np.floor(config.radius)) if config.style == "dino" else max(0, int(np.ceil(config.radius)) - 1)
    lines_seen = min(height, 2 * reach + 1 + -(-MAX_TILE // width))
    row_bytes = 4 * (num_contexts * lines_seen * width + (height * width if config.style == "crw" else 0))
    size: int = max(1, min(MAX_TILE, CHUNK_BYTES // row_bytes))
    if size > width:
        size -= size % width  # whole lines see the fewest keys
    for start in range(0, height * width, size):
        stop = min(start + size, height * width)
        first_line, last_line = max(0, start // width - reach), min(height, (stop - 1) // width + reach + 1)
        outside = _outside(range(start, stop), range(first_line, last_line), width, config)
        yield _Tile(start, stop, first_line * width, last_line * width, outside)


def _outside(queries: range, lines: range, width: int, config: PropagationConfig) -> torch.Tensor | None:
    query, key = torch.arange(queries.start, queries.stop), torch.arange(lines.start * width, lines.stop * width)
    rows = (query // width)[:, None] - (key // width)[None]
    columns = (query % width)[:, None] - (key % width)[None]
    if config.style == "dino":
        inside = (rows.abs() <= config.radius) & (columns.abs() <= config.radius)
    else:
        inside = rows.square() + columns.square() < config.radius**2
    if bool(inside.all()):
        return None
    return torch.zeros(inside.shape).masked_fill_(~inside, -torch.inf)


class _Scores:
    """One buffer for the scores of every tile: fresh memory for each costs more than the products of a small one."""

    def __init__(self, tiles: Sequence[_Tile], num_contexts: int) -> None:
        largest = max((tile.stop - tile.start) * (tile.key_stop - tile.key_start) for tile in tiles)
        self._buffer = torch.empty(largest * num_contexts)

    def of(self, frames: Sequence[_Frame], queries_QD: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """(N, Q, K) cosines, -inf outside the window; overwritten by the next call."""
        keys = slice(tile.key_start, tile.key_stop)
        shape = len(frames), len(queries_QD), tile.key_stop - tile.key_start
        scores_NQK = self._buffer[: math.prod(shape)].view(shape)
        for (features, _), out in zip(frames, scores_NQK, strict=True):
            if tile.outside is None:
                torch.mm(queries_QD, features[keys].T, out=out)
            else:
                torch.addmm(tile.outside, queries_QD, features[keys].T, out=out)
        return scores_NQK


def _tile_labels(
    queries_QD: torch.Tensor, tile: _Tile, contexts: tuple[_Frame, ...], scores: _Scores, config: PropagationConfig
) -> torch.Tensor:
    """(Q, C): the mean of the k most similar cells' labels, weighted by softmax(cosine / temperature)."""
    windowed = contexts if config.style == "dino" else contexts[1:]
    groups = []
    if config.style == "crw":
        features, labels = contexts[0]
        groups.append(((queries_QD @ features.T)[None], labels[None]))
    if windowed:
        keys = slice(tile.key_start, tile.key_stop)
        groups.append((scores.of(windowed, queries_QD, tile), torch.stack([labels[keys] for _, labels in windowed])))
    return _best_labels(groups, config)


def _best_labels(groups: Sequence[tuple[torch.Tensor, torch.Tensor]], config: PropagationConfig) -> torch.Tensor:
    """Join the groups' best candidates; each group is (scores (N, Q, K), labels (N, K, C))."""
    keep_ties = config.style == "dino"
    wanted = config.top_k + keep_ties  # one more than k shows whether the k-th has an equal
    found = [_top(scores, labels, wanted) for scores, labels in groups]
    scores_QM, labels_QMC = torch.cat([f[0] for f in found], dim=1), torch.cat([f[1] for f in found], dim=1)
    if len(found) > 1:
        scores_QM, order = scores_QM.topk(min(wanted, scores_QM.shape[1]), dim=1)
        labels_QMC = labels_QMC.gather(1, order[:, :, None].expand(-1, -1, labels_QMC.shape[-1]))
    k = min(config.top_k, scores_QM.shape[1])
    weights = torch.softmax(scores_QM[:, :k] / config.temperature, dim=1)
    result = torch.bmm(weights[:, None], labels_QMC[:, :k])[:, 0]
    if keep_ties and scores_QM.shape[1] > k:
        threshold = scores_QM[:, k - 1]
        tied = (scores_QM[:, k] == threshold) & torch.isfinite(threshold)
        if bool(tied.any()):
            scores_NQK, labels_NKC = groups[0]
            result[tied] = _all_from_threshold(scores_NQK[:, tied], threshold[tied], labels_NKC, config.temperature)
    return result


def _top(scores_NQK: torch.Tensor, labels_NKC: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each query over all contexts and places, descending, with their labels (Q, k, C).

    With several contexts in two stages: each of the k largest lies in one of the k places whose best context is
    largest, so only those places' contexts compete.
    """
    num_contexts, _, num_places = scores_NQK.shape
    labels = labels_NKC.reshape(-1, labels_NKC.shape[-1])
    if num_contexts < TWO_STAGE_FROM or num_places <= 2 * k:
        flat = _by_query(scores_NQK)
        values, index = flat.topk(min(k, flat.shape[1]), dim=1)
        return values, labels[index]
    places_Qk = scores_NQK.amax(dim=0).topk(k, dim=1, sorted=False).indices
    candidates = _by_query(scores_NQK.gather(2, places_Qk.expand(num_contexts, -1, -1)))
    values, chosen = candidates.topk(k, dim=1)
    index = (chosen // k) * num_places + places_Qk.gather(1, chosen % k)
    return values, labels[index]


def _all_from_threshold(
    scores_NRK: torch.Tensor, threshold_R: torch.Tensor, labels_NKC: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Labels (R, C) of queries whose k-th score has equals: every cell at or above the threshold counts."""
    scores = _by_query(scores_NRK)
    scores.masked_fill_(scores < threshold_R[:, None], -torch.inf)
    weights = torch.softmax(scores.div_(temperature), dim=1)
    return weights @ labels_NKC.reshape(-1, labels_NKC.shape[-1])


def _by_query(scores_NQK: torch.Tensor) -> torch.Tensor:
    """(N, Q, K) -> (Q, N * K), a copy unless N is 1."""
    return scores_NQK.transpose(0, 1).reshape(scores_NQK.shape[1], -1)
