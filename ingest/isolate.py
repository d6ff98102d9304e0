"""Decoding in a child that may die: the same code with limits on memory, time and file size, in an empty folder.

    python -m ingest.isolate FOLDER        reads FOLDER/request.json, writes results beside it

A worker decodes in process, which is fastest. Only where that crashed or hung before does each video get a child of
its own here; the child that dies or hangs names the poison video. Headers for the plan are always read this way, many
to a child, because the plan has no second attempt to fall back on.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from infra.faults import fault_point
from infra.media import MediaError, VideoInfo, VideoLimits, probe
from infra.media_encode import H264Settings
from infra.media_transcode import Transcoded, TranscodeSettings, transcode
from infra.supervise import Outcome, run

REQUEST, RESULT, MEMBERS = "request.json", "result.json", "members.bin"
PROBE_TIMEOUT_S = 60.0
MAX_FILE_BYTES = 16 << 30
OUT_OF_MEMORY = 3  # exit code of a child that ran into its memory limit
PROJECT = Path(__file__).resolve().parents[1]
Span = tuple[int, int | None]


def transcode_here(path: Path, settings: TranscodeSettings, span: Span) -> Transcoded:
    """Decode and encode in this process. Raises `MediaError`."""
    fault_point("ingest.decode", detail=str(path))
    return transcode(path, settings, span=span)


def transcode_isolated(path: Path, settings: TranscodeSettings, span: Span, *, memory_bytes: int) -> Transcoded:
    """`transcode_here` in a limited child. Raises `MediaError`, also `crash` and `timeout`."""
    request = {"task": "transcode", "path": str(path.absolute()), "settings": asdict(settings), "span": span}
    with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
        folder = Path(name)
        outcome = _run_child(request, folder, timeout_s=settings.timeout_s, memory_bytes=memory_bytes)
        if not (folder / RESULT).is_file():
            raise _verdict(outcome, settings.timeout_s)
        result = json.loads((folder / RESULT).read_bytes())
        if "reason" in result:
            raise MediaError(result["reason"], result["message"])
        return _unpack(result, (folder / MEMBERS).read_bytes())


def probe_isolated(
    paths: list[Path], *, limits: VideoLimits, memory_bytes: int, timeout_s: float = PROBE_TIMEOUT_S
) -> list[VideoInfo | MediaError]:
    """The header of each file, or why it has none. The files share a child until one of them kills it."""
    found: list[VideoInfo | MediaError] = []
    while len(found) < len(paths):
        rest = paths[len(found) :]
        request = {"task": "probe", "paths": [str(path.absolute()) for path in rest], "limits": asdict(limits)}
        with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
            folder = Path(name)
            outcome = _run_child(request, folder, timeout_s=timeout_s, memory_bytes=memory_bytes)
            found += _read_headers(folder / RESULT)
        if len(found) < len(paths):
            found.append(_verdict(outcome, timeout_s))
    return found


def _run_child(request: dict[str, Any], folder: Path, *, timeout_s: float, memory_bytes: int) -> Outcome:
    (folder / "empty").mkdir()
    (folder / REQUEST).write_text(json.dumps({**request, "memory_bytes": memory_bytes, "timeout_s": timeout_s}))
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in paths if part)}
    argv = [sys.executable, "-m", "ingest.isolate", str(folder)]
    return run(argv, timeout_s=timeout_s, cwd=folder / "empty", env=environment)


def _verdict(outcome: Outcome, timeout_s: float) -> MediaError:
    if outcome.timed_out or outcome.returncode == -signal.SIGXCPU:
        return MediaError("timeout", f"the decoder did not end within {timeout_s:g} s")
    if outcome.returncode == OUT_OF_MEMORY:
        return MediaError("too_large", "the decoder ran into its memory limit")
    if outcome.returncode < 0:
        return MediaError("crash", f"the decoder was ended by signal {-outcome.returncode}")
    return MediaError("crash", f"the decoder ended with exit code {outcome.returncode}")


def _unpack(result: dict[str, Any], blob: bytes) -> Transcoded:
    ends = np.cumsum(result.pop("sizes"))
    members = tuple(blob[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
    times = np.asarray(result.pop("timestamps_s"), np.float64)
    return Transcoded(members=members, timestamps_s=times, frame_numbers=tuple(result.pop("frame_numbers")), **result)


def _read_headers(path: Path) -> Iterator[VideoInfo | MediaError]:
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        value = json.loads(line)
        yield MediaError(**value) if "reason" in value else VideoInfo(**value)


def _limit(memory_bytes: int, timeout_s: float) -> None:
    """Soft and hard limits of this process; the parent's deadline is the wall clock's."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(timeout_s) + 5,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def _child_transcode(request: dict[str, Any], folder: Path) -> None:
    values = request["settings"]
    values |= {"h264": H264Settings(**values["h264"]), "limits": VideoLimits(**values["limits"])}
    first, end = request["span"]
    try:
        done = transcode_here(Path(request["path"]), TranscodeSettings(**values), (first, end))
    except MediaError as error:
        result: dict[str, Any] = {"reason": error.reason, "message": error.message}
    else:
        with (folder / MEMBERS).open("wb") as stream:
            stream.writelines(done.members)
        result = {name: getattr(done, name) for name in ("width", "height", "fps", "source_frames", "frame_numbers")}
        result |= {"sizes": [len(member) for member in done.members], "timestamps_s": done.timestamps_s.tolist()}
    # Renamed into place, so that a child killed while writing has given no answer.
    (folder / "result.part").write_text(json.dumps(result))
    (folder / "result.part").replace(folder / RESULT)


def _child_probe(request: dict[str, Any], folder: Path) -> None:
    limits = VideoLimits(**request["limits"])
    with (folder / RESULT).open("wb") as stream:
        for path in request["paths"]:
            fault_point("ingest.probe", detail=path)
            try:
                value = asdict(probe(Path(path), limits=limits))
            except MediaError as error:
                value = {"reason": error.reason, "message": error.message}
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()


def main(argv: list[str]) -> int:
    """Entry point of the child."""
    folder = Path(argv[0])
    request = json.loads((folder / REQUEST).read_bytes())
    _limit(request["memory_bytes"], request["timeout_s"])
    try:
        _child_probe(request, folder) if request["task"] == "probe" else _child_transcode(request, folder)
    except MemoryError:
        return OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
