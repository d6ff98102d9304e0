"""Pictures and clips as data URIs, within a byte budget; what cannot be inlined leaves a reason instead."""

from __future__ import annotations

import base64
import io
import logging
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from infra import storage
from infra.errors import ForeframeError

log = logging.getLogger(__name__)

THUMBNAIL_SIDE = 160
MAX_PICTURE_PIXELS = 40_000_000


@dataclass(frozen=True)
class Asset:
    """An inlined file, or the reason why it is not there: exactly one of `uri` and `missing` is set."""

    uri: str = ""
    missing: str = ""
    width: int = 0
    height: int = 0


def media_type(data: bytes) -> str:
    """The media type that content itself shows, "" for anything a report does not inline (SVG can hold scripts)."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        return "video/mp4"
    return ""


@dataclass
class AssetBox:
    """Inlines files until the budget is spent. One per report."""

    max_bytes: int
    spent_bytes: int = 0
    left_out: list[str] = field(default_factory=list)

    def inline(self, data: bytes, *, name: str, kind: str) -> Asset:
        """Data URI of bytes whose content is of `kind` ("image" or "video")."""
        found = media_type(data)
        if not found.startswith(kind):
            return Asset(missing=f"{name} is not {'an image' if kind == 'image' else 'an mp4 clip'}")
        size = 4 * ((len(data) + 2) // 3)
        if self.spent_bytes + size > self.max_bytes:
            self.left_out.append(name)
            return Asset(missing=f"{name} left out: the report's budget of {self.max_bytes / 1e6:.0f} MB is spent")
        width, height = _image_size(data) if kind == "image" else (0, 0)
        if kind == "image" and not width:
            return Asset(missing=f"{name} is a damaged image")
        self.spent_bytes += size
        encoded = base64.b64encode(data).decode("ascii")
        return Asset(uri=f"data:{found};base64,{encoded}", width=width, height=height)

    def read(self, url: str) -> bytes | Asset:
        """The bytes at a url; a missing or unreachable file becomes a reason, never an error."""
        try:
            return storage.read_bytes(url)
        except (ForeframeError, OSError) as error:
            log.warning("report: %s not inlined: %s", url, error)
            return Asset(missing=f"{url.rsplit('/', 1)[-1]} could not be read")

    def fetch(self, url: str) -> Asset:
        """Inline the image at a url."""
        data = self.read(url)
        return data if isinstance(data, Asset) else self.inline(data, name=url.rsplit("/", 1)[-1], kind="image")

    def pixels(self, image_HWC: npt.NDArray[np.uint8], *, name: str, max_side: int | None = None) -> Asset:
        """Inline an RGB array as JPEG, shrunk to `max_side`."""
        return self.inline(jpeg_thumbnail(image_HWC, max_side=max_side), name=name, kind="image")


def jpeg_thumbnail(image_HWC: npt.NDArray[np.uint8], *, max_side: int | None = THUMBNAIL_SIDE) -> bytes:
    """uint8 RGB -> JPEG bytes whose longer side is at most `max_side`."""
    picture = Image.fromarray(np.ascontiguousarray(image_HWC))
    if max_side is not None:
        picture.thumbnail((max_side, max_side))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _image_size(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS:
                return 0, 0
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0
    return width, height
