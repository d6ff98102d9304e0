"""What a clip looks like, in 256 bits: clips that differ in few of them show the same scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from infra.media import DEFAULT_LIMITS, VideoLimits
from infra.media_decode import decode_video
from infra.media_transcode import WHOLE, Span, part_of, timeline_of

LOOKS = (0.125, 0.375, 0.625, 0.875)  # of the clip's length
GRID = (9, 8)  # columns, rows: 8 x 8 comparisons between neighbours
BITS = len(LOOKS) * 64
FLAT_LEVELS = 8  # of 255 between the darkest and the lightest cell


def fingerprint(path: Path, *, span: Span = WHOLE, limits: VideoLimits = DEFAULT_LIMITS) -> str:
    """64 hexadecimal digits: at four moments, whether each cell of a coarse grey picture is lighter than its neighbour.

    Scaling, recompression and small shifts of colour change few bits. "" for a clip of flat pictures, which look like
    any other flat ones. Raises `MediaError`.
    """
    first, count = part_of(timeline_of(path, limits), span)
    pictures = decode_video(path, [first + int(share * count) for share in LOOKS])
    grids = [_grid(picture) for picture in pictures]
    if max(int(np.ptp(grid)) for grid in grids) < FLAT_LEVELS:
        return ""
    return np.packbits(np.concatenate([(grid[:, 1:] > grid[:, :-1]).ravel() for grid in grids])).tobytes().hex()


def _grid(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    grey = PillowImage.fromarray(picture).convert("L").resize(GRID, PillowImage.Resampling.BOX)
    return np.asarray(grey, np.int16)
