"""Contact sheets: a few frames of samples spread over the data set, one strip a camera."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from evaluation.report.assets import Asset, AssetBox
from evaluation.report.samples import CameraFacts, SampleFacts, Samples, even
from evaluation.report.text import cut, decimal, duration, grouped
from infra.errors import ForeframeError
from ingest.reader import ShardDataset

log = logging.getLogger(__name__)

MAX_SHEETS = 24
MAX_CAMERAS = 4
NUM_FRAMES = 6
FRAME_HEIGHT = 112
MAX_FRAME_WIDTH = 224
GAP = 2


@dataclass(frozen=True)
class Strip:
    """Frames of one camera in one picture; `times` says which."""

    camera: str
    picture: Asset
    facts: str


@dataclass(frozen=True)
class Sheet:
    """One sample as the page shows it."""

    caption: str
    has_caption: bool
    label: str
    source_id: str
    key: str
    facts: str
    strips: tuple[Strip, ...]
    more_cameras: int


def contact_sheets(data: ShardDataset, samples: Samples, box: AssetBox) -> tuple[tuple[Sheet, ...], list[str]]:
    """The sheets, and what could not be shown."""
    sheets: list[Sheet] = []
    notes: list[str] = []
    for sample in even(samples.facts, MAX_SHEETS):
        try:
            sheets.append(_sheet(data, sample, box))
        except (ForeframeError, OSError, ValueError) as error:
            log.warning("report: frames of %s: %s", sample.key, error)
            notes.append(f"Frames of {sample.key} could not be read: {error}")
    return tuple(sheets), notes


def frame_positions(num_frames: int, limit: int = NUM_FRAMES) -> list[int]:
    """First, last and what lies evenly between them; each frame at most once."""
    shown = min(num_frames, limit)
    if shown < 2:
        return [0] * shown
    return [round(position * (num_frames - 1) / (shown - 1)) for position in range(shown)]


def strip_of(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, H, W, 3) frames side by side, each `FRAME_HEIGHT` high, a thin white line between them."""
    height, width = frames.shape[1:3]
    size = (min(max(round(width * FRAME_HEIGHT / height), 1), MAX_FRAME_WIDTH), FRAME_HEIGHT)
    strip = np.full((FRAME_HEIGHT, len(frames) * (size[0] + GAP) - GAP, 3), 255, np.uint8)
    for number, frame in enumerate(frames):
        left = number * (size[0] + GAP)
        picture = Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        strip[:, left : left + size[0]] = np.asarray(picture)
    return strip


def _sheet(data: ShardDataset, sample: SampleFacts, box: AssetBox) -> Sheet:
    shown = sample.cameras[:MAX_CAMERAS]
    first = sample.cameras[0]
    cameras = f", {len(sample.cameras)} cameras" if len(sample.cameras) > 1 else ""
    return Sheet(
        caption=cut(sample.text) or "no caption",
        has_caption=bool(sample.text.strip()),
        label=cut(sample.label, limit=40),
        source_id=cut(sample.source_id, limit=80),
        key=sample.key,
        facts=f"{duration(first.seconds)}{cameras}, {sample.split}",
        strips=tuple(_strip(data, sample, camera, box) for camera in shown),
        more_cameras=len(sample.cameras) - len(shown),
    )


def _strip(data: ShardDataset, sample: SampleFacts, camera: CameraFacts, box: AssetBox) -> Strip:
    positions = frame_positions(data.num_frames(sample.index, camera.name))
    pixels = strip_of(data.frames(sample.index, positions, camera.name))
    picture = box.pixels(pixels, name=f"frames of {sample.key} ({camera.name})")
    facts = f"{grouped(camera.num_frames)} frames at {decimal(camera.fps)}/s, {camera.size.replace('x', ' × ')}"
    return Strip(camera.name, picture, facts)
