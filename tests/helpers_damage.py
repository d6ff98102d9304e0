"""Good videos of several containers, and ways to damage them: what `tests.faults.damaged_media` and the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.helpers_media import make_video

FRAMES = 20
DAMAGES = ("truncate", "flip", "zero", "delete")
SOUND = ["-f", "lavfi", "-i", "sine=frequency=330:duration=1.7", "-map", "0:v", "-map", "1:a"]


@dataclass(frozen=True)
class Kind:
    """How one of the good files is made. `counted`: its container declares how many frames it holds."""

    name: str
    suffix: str
    counted: bool
    options: tuple[str, ...] = ()
    sound: bool = False


KINDS = (
    Kind("mp4, index first", ".mp4", True, ("-movflags", "+faststart")),
    Kind("mp4, index last", ".mp4", True, ("-bf", "0", "-g", "8")),
    Kind("mov with sound", ".mov", True, ("-g", "10"), sound=True),
    Kind("avi", ".avi", True, ("-bf", "2")),
    Kind("mkv with sound", ".mkv", False, ("-g", "10"), sound=True),
    Kind("webm", ".webm", False, ("-b:v", "400k")),
)


def make_kind(kind: Kind, folder: Path) -> Path:
    """A good file of `FRAMES` frames."""
    path = folder / f"{kind.name.replace(', ', '-').replace(' ', '-')}{kind.suffix}"
    inputs = SOUND if kind.sound else []
    return make_video(path, frames=FRAMES, size="128x96", inputs=inputs, options=kind.options)


def damaged(data: bytes, damage: str, random: Random) -> bytes:
    """The file cut short, with 1 to 64 bytes changed, 16 to 4096 bytes zeroed, or 1 to 256 bytes missing."""
    mutant, at = bytearray(data), random.randrange(len(data))
    if damage == "truncate":
        return data[:at]
    if damage == "flip":
        for _ in range(random.randint(1, 64)):
            mutant[random.randrange(len(data))] ^= random.randint(1, 255)
    elif damage == "zero":
        size = min(random.randint(16, 4096), len(data) - at)
        mutant[at : at + size] = bytes(size)
    else:
        del mutant[at : at + random.randint(1, 256)]
    return bytes(mutant)
