"""Pictures and clips that an evaluation left beside its `result.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from evaluation.report.assets import Asset, AssetBox
from evaluation.report.frames import first_frame, stays_inside
from infra import storage

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4",)
MAX_PICTURES = 12
MAX_CLIPS = 48
POSTER_SIDE = 320


@dataclass(frozen=True)
class Exhibit:
    """One picture or clip; `poster` is the first frame of a clip."""

    title: str
    asset: Asset
    poster: Asset | None = None
    arm: str = ""  # empty: the model itself


@dataclass(frozen=True)
class Gallery:
    """What of a result's artefacts can be looked at, and what cannot."""

    pictures: tuple[Exhibit, ...] = ()
    clips: tuple[Exhibit, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def own_clips(self) -> tuple[Exhibit, ...]:
        """Clips of the model itself."""
        return tuple(clip for clip in self.clips if not clip.arm)

    @property
    def arm_clips(self) -> tuple[Exhibit, ...]:
        """Clips of its control arms."""
        return tuple(clip for clip in self.clips if clip.arm)

    @property
    def has_wide(self) -> bool:
        """Whether a picture is a strip of several frames, which needs a wide column to be read."""
        return any(exhibit.asset.width > 2 * exhibit.asset.height for exhibit in self.pictures)


def gallery(folder: str, artefacts: dict[str, str], box: AssetBox, *, arms: Iterable[str] = ()) -> Gallery:
    """Inline the images and mp4 clips among the artefacts (title -> path relative to the folder).

    What belongs to one of the `arms` comes after what belongs to the model: a budget is spent on the model first.
    """
    names = tuple(arms)
    placed = sorted(((_arm_of(title, path, names), title, path) for title, path in artefacts.items()), key=_rank)
    pictures: list[Exhibit] = []
    clips: list[Exhibit] = []
    notes: list[str] = []
    for arm, title, path in placed:
        suffix = PurePosixPath(path).suffix.lower()
        if not stays_inside(path):
            notes.append(f"{title}: path {path} leaves the result's folder and was not read.")
        elif suffix in IMAGE_SUFFIXES and len(pictures) < MAX_PICTURES:
            pictures.append(Exhibit(title, box.fetch(storage.join(folder, path)), arm=arm))
        elif suffix in CLIP_SUFFIXES and len(clips) < MAX_CLIPS:
            clips.append(_clip(title, storage.join(folder, path), box, arm=arm))
    for name, suffixes, limit in (("pictures", IMAGE_SUFFIXES, MAX_PICTURES), ("clips", CLIP_SUFFIXES, MAX_CLIPS)):
        total = sum(PurePosixPath(path).suffix.lower() in suffixes for path in artefacts.values())
        if total > limit:
            notes.append(f"{limit} of {total} {name} are shown.")
    notes.extend(f"{exhibit.asset.missing}." for exhibit in (*pictures, *clips) if exhibit.asset.missing)
    return Gallery(
        tuple(exhibit for exhibit in pictures if exhibit.asset.uri),
        tuple(exhibit for exhibit in clips if exhibit.asset.uri),
        tuple(notes),
    )


def _arm_of(title: str, path: str, arms: tuple[str, ...]) -> str:
    """The arm that a title names between commas, or a file name begins with; "" for the model's own."""
    words = {word.strip() for word in re.split(r"[,:]", title)}
    stem = PurePosixPath(path).stem
    return next((arm for arm in arms if arm in words or stem == arm or stem.startswith(f"{arm}-")), "")


def _rank(placed: tuple[str, str, str]) -> bool:
    return bool(placed[0])


def _clip(title: str, url: str, box: AssetBox, *, arm: str) -> Exhibit:
    data = box.read(url)
    if isinstance(data, Asset):
        return Exhibit(title, data, arm=arm)
    asset = box.inline(data, name=url.rsplit("/", 1)[-1], kind="video")
    frame = first_frame(data) if asset.uri else None
    poster = None if frame is None else box.pixels(frame, name=f"first frame of {title}", max_side=POSTER_SIDE)
    return Exhibit(title, asset, poster, arm)
