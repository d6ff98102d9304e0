"""Playlists, scripts and paths that name other files or addresses: `python -m tests.faults.hostile_containers`.

Each is tried with both engines and as bytes, and again past the check of the first bytes, where only libav's own
whitelists stand (there, a video whose frames are said to lie elsewhere opens with its own). A server on loopback
counts requests, the kernel (inotify) every opening of the file beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from infra.media import MediaError, probe, scan
from infra.media_ffmpeg import FfmpegJob, planes_command
from infra.media_transcode import TranscodeSettings, transcode
from tests.helpers_hostile import SIBLING, hostile_paths, hostile_texts, other_contents, watched_server
from tests.helpers_media import make_video

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


@dataclass(frozen=True)
class Row:
    """What came of one input: the reason of each attempt, or "OPENED"."""

    name: str
    outcomes: dict[str, str]
    openings: int
    requests: int

    @property
    def contained(self) -> bool:
        """Refused by our opener, and nothing else was touched even behind it."""
        ours = [self.outcomes[name] for name in ("pyav", "ffmpeg", "bytes")]
        return "OPENED" not in ours and self.openings == self.requests == 0


class OpenWatch:
    """Counts how often any process opens a file."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0 or library.inotify_add_watch(self._descriptor, os.fsencode(path), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify is not to be had")

    def count(self) -> int:
        """Openings since the last call."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return 0
        return len(data) // EVENT.size


def attempts_at(path: Path, good: Path) -> dict[str, Callable[[], object]]:
    """Both engines through our opener, the content as bytes, and what stands behind the check of the first bytes."""
    job = FfmpegJob(path, scan(good), (96, 64), (0, 20))

    def program() -> None:
        ended = subprocess.run(planes_command(job), capture_output=True, timeout=60, check=False)
        if ended.returncode:
            raise MediaError("refused", "")

    def past_first_bytes(source: Path | bytes) -> object:
        with mock.patch("infra.media._check_signature"):
            return scan(source)

    data = path.read_bytes() if path.is_file() else b"#EXTM3U\n"
    return {
        "pyav": lambda: transcode(path, TranscodeSettings()),
        "ffmpeg": lambda: transcode(path, TranscodeSettings(engine="ffmpeg")),
        "bytes": lambda: scan(data),
        "libav alone": lambda: past_first_bytes(path),
        "libav alone, bytes": lambda: past_first_bytes(data),
        "program alone": program,
    }


def try_all(folder: Path) -> Iterator[Row]:
    """A row for each input. The working folder is the one where a relative entry would be found."""
    good = make_video(folder / SIBLING, frames=20, options=["-movflags", "+faststart"])
    with contextlib.chdir(folder), watched_server() as (address, seen):
        inputs = {name: Path(f"{name}.mp4") for name in hostile_texts(good, address) | other_contents(good, address)}
        for name, data in (hostile_texts(good, address) | other_contents(good, address)).items():
            inputs[name].write_bytes(data)
        inputs |= {f"path {text.replace(address, 'http://HOST')}": Path(text) for text in hostile_paths(good, address)}
        for name, path in inputs.items():
            attempts = attempts_at(path, good)
            watch, asked = OpenWatch(good), len(seen)
            outcomes = {label: outcome_of(attempt) for label, attempt in attempts.items()}
            yield Row(name, outcomes, watch.count(), len(seen) - asked)
        # A path that is none is made absolute by the opener; the program gets it after `file:`.
        assert probe(good).declared_frames == 20


def outcome_of(attempt: Callable[[], object]) -> str:
    """The reason of the refusal."""
    try:
        attempt()
    except MediaError as error:
        return error.reason
    return "OPENED"


def main() -> int:
    """Print the table; 1 if anything was not contained."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(try_all(Path(folder)))
    print(f"| input | {' | '.join(rows[0].outcomes)} | file beside opened | requests |")
    print("| --- " * (len(rows[0].outcomes) + 3) + "|")
    for row in rows:
        print(f"| {row.name} | {' | '.join(row.outcomes.values())} | {row.openings} | {row.requests} |")
    contained = sum(row.contained for row in rows)
    tries = sum(len(row.outcomes) for row in rows)
    print(f"\n{contained} of {len(rows)} inputs contained in {tries} attempts,", end=" ")
    print(f"{sum(row.openings for row in rows)} other files opened, {sum(row.requests for row in rows)} requests")
    return int(contained < len(rows))


if __name__ == "__main__":
    sys.exit(main())
