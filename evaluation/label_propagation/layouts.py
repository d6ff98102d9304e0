"""Folders of annotated video. DAVIS-2017: written for the simulator's sequences, read for those and the real set.

    ROOT/JPEGImages/480p/SEQUENCE/00000.jpg
    ROOT/Annotations/480p/SEQUENCE/00000.png      indexed PNG, value = object number, 0 = background, 255 = void
    ROOT/ImageSets/2017/val.txt                   one sequence name a line

Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from infra.errors import InputError
from infra.storage import write_bytes

Frames = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]

RESOLUTION = "480p"
YEAR = "2017"
VOID = 255
JPEG_QUALITY = 95
EXPECTED = (
    f"Expected ROOT/JPEGImages/{RESOLUTION}/NAME/00000.jpg, ROOT/Annotations/{RESOLUTION}/NAME/00000.png "
    f"for every frame, and the names in ROOT/ImageSets/{YEAR}/val.txt."
)


@dataclass(frozen=True)
class DavisFolder:
    """A checked DAVIS-2017 folder; pictures are read when asked for."""

    root: Path
    names: tuple[str, ...]
    frame_names: dict[str, tuple[str, ...]]  # per sequence: "00000", "00001", ...
    resolution: str = RESOLUTION

    def frames(self, name: str) -> Frames:
        """(T, H, W, 3) uint8 RGB of one sequence."""
        return self._stack(name, "JPEGImages", "jpg")

    def labels(self, name: str) -> Labels:
        """(T, H, W) uint8 object numbers; void pixels count as background, as in the semi-supervised task."""
        labels_THW = self._stack(name, "Annotations", "png")
        return np.where(labels_THW == VOID, 0, labels_THW).astype(np.uint8)

    def _stack(self, name: str, kind: str, suffix: str) -> npt.NDArray[np.uint8]:
        folder = self.root / kind / self.resolution / name
        pictures = [_read(folder / f"{frame}.{suffix}", indexed=suffix == "png") for frame in self.frame_names[name]]
        sizes = {picture.shape[:2] for picture in pictures}
        if len(sizes) != 1:
            raise InputError(f"the pictures of {folder} differ in size: {sorted(sizes)}.", remedy=EXPECTED)
        return np.stack(pictures)


def read_davis(root: str | Path, *, split: str = "val", resolution: str = RESOLUTION) -> DavisFolder:
    """Check a folder and list it. Raises `InputError` that names the first missing file and the layout expected."""
    root = Path(root)
    listing = root / "ImageSets" / YEAR / f"{split}.txt"
    if not listing.is_file():
        raise InputError(f"{listing} is missing.", remedy=EXPECTED)
    names = tuple(line.strip() for line in listing.read_text().splitlines() if line.strip())
    if not names:
        raise InputError(f"{listing} names no sequence.", remedy=EXPECTED)
    frame_names = {name: _check_sequence(root, name, resolution, listing) for name in names}
    return DavisFolder(root, names, frame_names, resolution)


def write_davis_sequence(root: str | Path, name: str, *, frames_THW3: Frames, labels_THW: Labels) -> None:
    """Write one sequence; it is part of the folder once `write_davis_split` names it."""
    if frames_THW3.shape[:3] != labels_THW.shape or not len(labels_THW):
        raise InputError(f"{name}: {frames_THW3.shape} pictures do not fit {labels_THW.shape} labels.")
    for index, (frame, labels) in enumerate(zip(frames_THW3, labels_THW, strict=True)):
        write_bytes(_file(root, "JPEGImages", name, f"{index:05d}.jpg"), _jpeg(frame))
        write_bytes(_file(root, "Annotations", name, f"{index:05d}.png"), _indexed_png(labels))


def write_davis_split(root: str | Path, names: tuple[str, ...], *, split: str = "val") -> None:
    """Write the list of sequences, last of all: a folder with it is complete."""
    write_bytes(Path(root) / "ImageSets" / YEAR / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())


def palette() -> bytes:
    """256 RGB colours, the bits of the index spread over the three channels: neighbours look different."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            colours[index, bit % 3] |= ((index >> bit) & 1) << (7 - bit // 3)
    return colours.tobytes()


def _check_sequence(root: Path, name: str, resolution: str, listing: Path) -> tuple[str, ...]:
    if PurePosixPath(name).name != name or name in {".", ".."}:
        raise InputError(f"{listing} names {name!r}, which is no folder name.", remedy=EXPECTED)
    pictures = root / "JPEGImages" / resolution / name
    annotations = root / "Annotations" / resolution / name
    frames = tuple(sorted(path.stem for path in pictures.glob("*.jpg")))
    if not frames:
        raise InputError(f"{pictures / '00000.jpg'} is missing.", remedy=EXPECTED)
    for frame in frames:
        if not (annotations / f"{frame}.png").is_file():
            raise InputError(f"{annotations / f'{frame}.png'} is missing.", remedy=EXPECTED)
    return frames


def _file(root: str | Path, kind: str, name: str, file: str) -> Path:
    return Path(root) / kind / RESOLUTION / name / file


def _read(path: Path, *, indexed: bool) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            if not indexed:
                return np.asarray(picture.convert("RGB"))
            if picture.mode not in {"P", "L"}:
                raise InputError(f"{path} has colours ({picture.mode}) where object numbers belong.", remedy=EXPECTED)
            return np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read: {error}.", remedy=EXPECTED) from None


def _jpeg(frame: Frames) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _indexed_png(labels_HW: Labels) -> bytes:
    picture = Image.fromarray(labels_HW)
    picture.putpalette(palette())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
