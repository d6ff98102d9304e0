"""First frames of clips and of quarantined videos, decoded behind the same guards as ingest."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.errors import ForeframeError
from infra.media import MediaError, VideoLimits, open_video
from infra.media_decode import rgb_of

log = logging.getLogger(__name__)

MAX_SOURCE_BYTES = 256_000_000  # a remote file is fetched whole to look at its first frame
LIMITS = VideoLimits(max_frame_pixels=10_000_000)


def first_frame(source: Path | bytes) -> npt.NDArray[np.uint8] | None:
    """(H, W, 3) RGB of the first frame that decodes, None when none does: later damage does not matter here."""
    try:
        with open_video(source, limits=LIMITS) as (container, stream):
            for frame in container.decode(stream):
                return rgb_of(frame)
    except MediaError as error:
        log.debug("no first frame: %s", error)
    return None


def first_frame_at(url: str) -> npt.NDArray[np.uint8] | None:
    """`first_frame` of a local or remote file; None when it cannot be read or is too large to fetch."""
    if not storage.is_remote(url):
        return first_frame(Path(url))
    try:
        if storage.size_bytes(url) > MAX_SOURCE_BYTES:
            return None
        return first_frame(storage.read_bytes(url))
    except (ForeframeError, OSError) as error:
        log.debug("no first frame of %s: %s", url, error)
        return None


def stays_inside(path: str) -> bool:
    """Whether a relative path from a record cannot leave the folder it is relative to."""
    parts = path.replace("\\", "/").split("/")
    return bool(path) and "://" not in path and parts[0] != "" and ".." not in parts and "\x00" not in path
