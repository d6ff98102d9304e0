"""Predicted videos beside the true ones, for people to look at; nothing is scored on them.

Shape letters: T frames, H height, W width, S image side.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infra.errors import ConfigError
from infra.media_encode import encode_video
from infra.storage import join, write_bytes
from ingest.windows import ClipSource, ClipWindows
from training.protocols import Images, VideoPredictor

PANEL_SIDE = 128  # smaller pictures are enlarged to about this, by whole numbers
CAPTION_HEIGHT = 16
GAP = 2
SHEET_FRAMES = 8
TEXT_COLOUR = (20, 20, 20)
VIDEO_CRF = 15


@dataclass(frozen=True)
class PreviewClip:
    """One true clip: `frames` (T, H, W, 3) uint8 of any size, its sentence, and its name over all sources."""

    key: str
    text: str
    frames: Images


def spread_clips(sources: Sequence[ClipSource], num_clips: int) -> list[PreviewClip]:
    """`num_clips` clips (or all, if fewer) spread evenly over the clips of all sources, the same ones every time.

    Read from pixels, whatever the sources say of latents. `InputError` when a source has no clip in its split.
    """
    windows = [ClipWindows(source) for source in sources]
    places = [(number, clip) for number, listed in enumerate(windows) for clip in _spread(len(listed), num_clips)]
    chosen = [places[position] for position in _spread(len(places), num_clips)]
    return [
        PreviewClip(
            key=f"{sources[number].name}/{windows[number].key(clip)}",
            text=windows[number].text(clip),
            frames=windows[number].frames(clip),
        )
        for number, clip in chosen
    ]


def write_previews(
    folder: str | Path,
    predictor: VideoPredictor,
    clips: Sequence[PreviewClip],
    *,
    name: str = "preview",
    num_steps: int = 30,
    guidance: tuple[float, float] = (1.0, 3.0),
    seed: int = 0,
    fps: float = 7.0,
) -> tuple[str, str]:
    """Write `NAME.mp4` (clips below one another) and `NAME.png` (their frames side by side); returns the two urls.

    The columns are the truth, the prediction in one step, and the one in `num_steps`. `folder` may be `s3://`.
    """
    if not clips:
        raise ConfigError("previews of no clips.", remedy="Ask for at least one.")
    rows = [_columns(predictor, clip, num_steps=num_steps, guidance=guidance, seed=seed) for clip in clips]
    video = np.concatenate([side_by_side(row, text=clip.text) for row, clip in zip(rows, clips, strict=True)], axis=1)
    sheet = np.concatenate([contact_sheet(row, text=clip.text) for row, clip in zip(rows, clips, strict=True)])
    urls = join(folder, f"{name}.mp4"), join(folder, f"{name}.png")
    write_bytes(urls[0], _mp4(video, fps=fps))
    write_bytes(urls[1], png_bytes(sheet))
    return urls


def side_by_side(columns: Mapping[str, Images], *, text: str = "") -> Images:
    """Videos (T, S, S, 3) of one size under their names -> (T, H, W, 3), sides even; `text` stands above them.

    Raises `ConfigError` when the videos differ in shape.
    """
    panels = _enlarged(columns)
    num_frames, height, width = next(iter(panels.values())).shape[:3]
    canvas = _canvas(2 * CAPTION_HEIGHT + height, len(panels) * (width + GAP) - GAP)
    captions = {name: (column * (width + GAP) + GAP, CAPTION_HEIGHT) for column, name in enumerate(panels)}
    background = _write(canvas, {text: (GAP, 0), **captions} if text else captions)
    video = np.repeat(background[None], num_frames, axis=0)
    for column, frames in enumerate(panels.values()):
        left = column * (width + GAP)
        video[:, 2 * CAPTION_HEIGHT : 2 * CAPTION_HEIGHT + height, left : left + width] = frames
    return video


def contact_sheet(columns: Mapping[str, Images], *, text: str = "", num_frames: int = SHEET_FRAMES) -> Images:
    """The same videos as one picture (H, W, 3): a row for each, at most `num_frames` frames from first to last."""
    panels = _enlarged(columns)
    length, height, width = next(iter(panels.values())).shape[:3]
    shown = np.linspace(0, length - 1, min(num_frames, length)).round().astype(int)
    row_height = CAPTION_HEIGHT + height + GAP
    canvas = _canvas(CAPTION_HEIGHT + len(panels) * row_height, len(shown) * (width + GAP) - GAP)
    captions = {name: (GAP, CAPTION_HEIGHT + row * row_height) for row, name in enumerate(panels)}
    sheet = _write(canvas, {text: (GAP, 0), **captions} if text else captions)
    for row, frames in enumerate(panels.values()):
        top = CAPTION_HEIGHT + row * row_height + CAPTION_HEIGHT
        for column, frame in enumerate(shown):
            left = column * (width + GAP)
            sheet[top : top + height, left : left + width] = frames[frame]
    return sheet


def png_bytes(picture: Images) -> bytes:
    """(H, W, 3) uint8 -> PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _columns(
    predictor: VideoPredictor, clip: PreviewClip, *, num_steps: int, guidance: tuple[float, float], seed: int
) -> dict[str, Images]:
    first = clip.frames[:1]
    one_step = predictor.predict(first, [clip.text], num_steps=1, guidance=guidance, seed=seed)[0]
    many_steps = predictor.predict(first, [clip.text], num_steps=num_steps, guidance=guidance, seed=seed)[0]
    truth = np.stack([_squashed(frame, predictor.image_size) for frame in clip.frames])
    return {"truth": truth, "1 step": one_step, f"{num_steps} steps": many_steps}


def _squashed(frame: Images, side: int) -> Images:
    """A picture for the eye only: what the model sees is resized by the data set's rule."""
    if frame.shape[:2] == (side, side):
        return frame
    return np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR))


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` positions, the middles of equal spans; all of them when there are no more."""
    wanted = min(count, wanted)
    return [(2 * position + 1) * count // (2 * wanted) for position in range(wanted)]


def _enlarged(columns: Mapping[str, Images]) -> dict[str, Images]:
    shapes = {name: frames.shape for name, frames in columns.items()}
    if len(set(shapes.values())) != 1:
        raise ConfigError(f"videos of different shapes cannot stand side by side: {shapes}.")
    factor = max(1, PANEL_SIDE // next(iter(shapes.values()))[1])
    return {name: frames.repeat(factor, axis=1).repeat(factor, axis=2) for name, frames in columns.items()}


def _canvas(height: int, width: int) -> Image.Image:
    """White, its sides rounded up to even ones: H.264 stores no others."""
    return Image.new("RGB", (width + width % 2, height + height % 2), "white")


def _write(canvas: Image.Image, places: Mapping[str, tuple[int, int]]) -> Images:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for text, place in places.items():
        draw.text(place, text, fill=TEXT_COLOUR, font=font)
    return np.array(canvas)


def _mp4(frames: Images, *, fps: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        path = Path(folder) / "preview.mp4"
        encode_video(frames, path, fps=fps, crf=VIDEO_CRF)
        return path.read_bytes()
