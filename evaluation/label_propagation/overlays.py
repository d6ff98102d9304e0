"""Pictures to look at: propagated masks over the frames, the model beside truth and control arms."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
SHARES = (0.25, 0.5, 1.0)  # of the sequence
PANEL_HEIGHT = 192
CAPTION_HEIGHT = 20
OPACITY = 0.6
# Far from the colours of arms, tables and each other; objects beyond the sixth begin again.
COLOURS = ((0, 90, 255), (255, 210, 0), (255, 0, 200), (0, 230, 230), (255, 120, 0), (150, 60, 255))
GAP = 4


def overlay_strips(frames: Pixels, maps: Mapping[str, Pixels]) -> dict[str, bytes]:
    """Percent of the sequence ("025", "050", "100") -> PNG strip with one captioned panel for each label map (T, H, W).

    The frame at a share s is the one nearest to s * (T - 1).
    """
    strips = {}
    for share in SHARES:
        index = round(share * (len(frames) - 1))
        panels = {caption: blend(frames[index], labels[index]) for caption, labels in maps.items()}
        strips[f"{round(100 * share):03d}"] = _png(_strip(panels))
    return strips


def blend(frame: Pixels, labels: Pixels) -> Pixels:
    """Colour the objects of a (H, W, 3) frame; background stays as it is."""
    colours = np.array(COLOURS, np.float32)[(labels.astype(np.int64) - 1) % len(COLOURS)]
    mixed = (1 - OPACITY) * frame.astype(np.float32) + OPACITY * colours
    return np.where((labels > 0)[..., None], mixed.round(), frame).astype(np.uint8)


def _strip(panels: Mapping[str, Pixels]) -> Image.Image:
    height, width = next(iter(panels.values())).shape[:2]
    panel_width = max(1, round(width * PANEL_HEIGHT / height))
    size = (len(panels) * (panel_width + GAP) - GAP, PANEL_HEIGHT + CAPTION_HEIGHT)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for column, (caption, pixels) in enumerate(panels.items()):
        left = column * (panel_width + GAP)
        small = Image.fromarray(pixels).resize((panel_width, PANEL_HEIGHT), Image.Resampling.BOX)
        picture.paste(small, (left, CAPTION_HEIGHT))
        draw.text((left + 2, 2), caption, fill="black", font=font)
    return picture


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
