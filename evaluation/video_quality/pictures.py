"""Pictures and clips to look at: truth beside copy, one step, many steps and what the autoencoder alone loses."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.video_quality.metrics import Clip
from infra.media_encode import encode_video

PANEL_SIDE = 96
CAPTION_SIDE = 20
MAX_COLUMNS = 8
GAP = 2
FPS = 6.0
CRF = 18
LABEL_WIDTH = 96


def strip_png(clips: Mapping[str, Clip]) -> bytes:
    """One row for each caption, at most 8 frames across, evenly chosen with the first and the last."""
    length = len(next(iter(clips.values())))
    shown = np.linspace(0, length - 1, min(length, MAX_COLUMNS)).round().astype(int)
    width = LABEL_WIDTH + len(shown) * (PANEL_SIDE + GAP)
    picture = Image.new("RGB", (width, CAPTION_SIDE + len(clips) * (PANEL_SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for column, frame in enumerate(shown):
        left = LABEL_WIDTH + column * (PANEL_SIDE + GAP)
        draw.text((left + 2, 3), f"frame {frame}", fill="black", font=font)
    for row, (caption, clip) in enumerate(clips.items()):
        top = CAPTION_SIDE + row * (PANEL_SIDE + GAP)
        draw.text((4, top + PANEL_SIDE // 2 - 8), caption, fill="black", font=font)
        for column, frame in enumerate(shown):
            picture.paste(_panel(clip[frame]), (LABEL_WIDTH + column * (PANEL_SIDE + GAP), top))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def side_by_side(clips: Mapping[str, Clip]) -> Clip:
    """(T, H, W, 3) uint8 with one captioned column for each clip; both sides are even, as H.264 wants them."""
    width = len(clips) * (PANEL_SIDE + GAP)
    size = (width + width % 2, PANEL_SIDE + CAPTION_SIDE)
    blank = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(blank), ImageFont.load_default(size=12)
    for column, caption in enumerate(clips):
        draw.text((column * (PANEL_SIDE + GAP) + 2, 3), caption, fill="black", font=font)
    frames = []
    for index in range(len(next(iter(clips.values())))):
        picture = blank.copy()
        for column, clip in enumerate(clips.values()):
            picture.paste(_panel(clip[index]), (column * (PANEL_SIDE + GAP), CAPTION_SIDE))
        frames.append(np.asarray(picture))
    return np.stack(frames)


def side_by_side_mp4(clips: Mapping[str, Clip]) -> bytes:
    """The columns of `side_by_side` as H.264."""
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        path = Path(folder) / "clip.mp4"
        encode_video(side_by_side(clips), path, fps=FPS, crf=CRF)
        return path.read_bytes()


def _panel(frame: Clip) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    kind = Image.Resampling.NEAREST if picture.width <= PANEL_SIDE else Image.Resampling.BOX
    return picture.resize((PANEL_SIDE, PANEL_SIDE), kind)
