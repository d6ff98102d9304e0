"""Broken videos planted among good ones, each broken in a known way: what ingest must refuse, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from infra.config import Config
from infra.errors import InputError
from infra.storage import join, list_names, read_bytes, read_json, write_bytes, write_json
from ingest.schema import ReasonCode

FILLER_NAL = 12  # H.264 filler data: a lawful packet that gives no picture
NAL_LENGTH_BYTES = 4


class PlantedFile(Config):
    """One broken video: where it lies, what was done to it, and the reason ingest must give."""

    path: str  # relative to the corpus
    donor: str  # the good episode it was made from
    damage: str
    reason: ReasonCode


def plant(folder: str, *, seed: int) -> tuple[PlantedFile, ...]:
    """Write `<task>/planted-<kind>.mp4` of five kinds, each with the sidecar and arrays of a good episode beside it.

    A function of the episodes and the seed. The good files are not touched.
    """
    records = [name for name in list_names(folder, suffix=".json", recursive=True) if "/seed-" in f"/{name}"]
    if not records:
        raise InputError(f"{folder} holds no episode to make broken ones of.", remedy="Simulate first.")
    rng = np.random.default_rng(seed)
    makers: dict[str, tuple[Callable[[bytes, str], bytes], str, ReasonCode]] = {
        "truncated": (_truncated, "cut at 60 % of its bytes", "truncated"),
        "empty": (_empty, "zero bytes", "empty"),
        "text": (_text, "plain text named .mp4", "not_video"),
        "concat": (_concat, "a concat script that names its neighbour", "hostile_container"),
        "short-decode": (_short_decode, "the last third of its pictures is filler data", "short_decode"),
    }
    planted = []
    for kind, (maker, damage, reason) in makers.items():
        donor = records[int(rng.integers(len(records)))].removesuffix(".json")
        stem = f"{donor.rsplit('/', 1)[0]}/planted-{kind}"
        video = read_bytes(join(folder, f"{donor}.mp4"))
        write_bytes(join(folder, f"{stem}.mp4"), maker(video, f"{donor.rsplit('/', 1)[1]}.mp4"))
        write_bytes(join(folder, f"{stem}.npz"), read_bytes(join(folder, f"{donor}.npz")))
        write_json(join(folder, f"{stem}.json"), _sidecar(folder, donor, kind))
        planted.append(PlantedFile(path=f"{stem}.mp4", donor=f"{donor}.mp4", damage=damage, reason=reason))
    return tuple(planted)


def _sidecar(folder: str, donor: str, kind: str) -> dict[str, Any]:
    record: dict[str, Any] = read_json(join(folder, f"{donor}.json"))
    return {key: value for key, value in record.items() if key != "sha256"} | {"planted": kind}


def _truncated(video: bytes, neighbour: str) -> bytes:
    return video[: len(video) * 6 // 10]


def _empty(video: bytes, neighbour: str) -> bytes:
    return b""


def _text(video: bytes, neighbour: str) -> bytes:
    return b"This file is a note, not a video. Someone gave it the wrong name.\n" * 40


def _concat(video: bytes, neighbour: str) -> bytes:
    return f"ffconcat version 1.0\nfile '{neighbour}'\nfile '{neighbour}'\n".encode()


def _short_decode(video: bytes, neighbour: str) -> bytes:
    """The container declares and stores every packet, but the decoder gets no picture out of the last third."""
    start, end = _media_data(video)
    units = []
    position = start
    while position + NAL_LENGTH_BYTES < end:
        length = int.from_bytes(video[position : position + NAL_LENGTH_BYTES], "big")
        units.append((position + NAL_LENGTH_BYTES, length))
        position += NAL_LENGTH_BYTES + length
    damaged = bytearray(video)
    for offset, length in units[len(units) * 2 // 3 :]:
        damaged[offset : offset + length] = bytes([FILLER_NAL]) + b"\xff" * (length - 2) + b"\x80"
    return bytes(damaged)


def _media_data(video: bytes) -> tuple[int, int]:
    """[start, end) of the content of the `mdat` box of an MP4."""
    position = 0
    while position + 8 <= len(video):
        size, kind, header = (
            int.from_bytes(video[position : position + 4], "big"),
            video[position + 4 : position + 8],
            8,
        )
        if size == 1:
            size, header = int.from_bytes(video[position + 8 : position + 16], "big"), 16
        if kind == b"mdat":
            return position + header, position + (size or len(video) - position)
        if size < header:
            break
        position += size
    raise InputError("the donor of a planted video is no MP4 with media data.")
