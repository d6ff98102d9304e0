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


def fingerprint(path: Path, *, span: Span = WHOLE, limits: VideoLimits = DEFAULT_LIMITS) -> str:
    """64 hexadecimal digits: at four moments, whether each cell of a coarse grey picture is lighter than its neighbour.

    Scaling, recompression and small shifts of colour change few bits. Raises `MediaError`.
    """
    first, count = part_of(timeline_of(path, limits), span)
    pictures = decode_video(path, [first + int(share * count) for share in LOOKS])
    bits = np.concatenate([_differences(picture) for picture in pictures])
    return np.packbits(bits).tobytes().hex()


def _differences(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    grey = PillowImage.fromarray(picture).convert("L").resize(GRID, PillowImage.Resampling.BOX)
    levels = np.asarray(grey, np.int16)
    return (levels[:, 1:] > levels[:, :-1]).ravel()
