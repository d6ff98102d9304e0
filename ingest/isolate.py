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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from infra.faults import fault_point
from infra.media import MediaError, VideoInfo, VideoLimits, probe
from infra.media_encode import H264Settings
from infra.media_fingerprint import fingerprint
from infra.media_transcode import Span, Transcoded, TranscodeSettings, part_of, timeline_of, transcode
from infra.supervise import Outcome, run

REQUEST, RESULT, MEMBERS = "request.json", "result.json", "members.bin"
PROBE_TIMEOUT_S = 60.0
PART_TIMEOUT_S = 5.0
FILE_TIMEOUT_S = 1.0
SLOW_BYTES_PER_S = 5e6
MAX_FILE_BYTES = 16 << 30
OUT_OF_MEMORY = 3  # exit code of a child that ran into its memory limit
PROJECT = Path(__file__).resolve().parents[1]
ARRAYS = ("timestamps_s", "brightness", "change")


@dataclass(frozen=True)
class Probed:
    """A file's header, how many frames each part asked about has, and what it looks like ("" where that is unknown)."""

    info: VideoInfo
    counts: tuple[int, ...] = ()
    fingerprints: tuple[str, ...] = ()


def transcode_here(path: Path, settings: TranscodeSettings, span: Span) -> Transcoded:
    """Decode and encode in this process. Raises `MediaError`."""
    fault_point("ingest.decode", detail=str(path))
    return transcode(path, settings, span=span)


def transcode_isolated(path: Path, settings: TranscodeSettings, span: Span, *, memory_bytes: int) -> Transcoded:
    """`transcode_here` in a limited child. Raises `MediaError`, also `crash` and `timeout`."""
    request = {"task": "transcode", "path": str(path.absolute()), "settings": asdict(settings), "span": asdict(span)}
    with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
        folder = Path(name)
        outcome = _run_child(request, folder, timeout_s=settings.timeout_s, memory_bytes=memory_bytes)
        if outcome.returncode == -signal.SIGKILL and not outcome.timed_out:
            # No decoder does that to itself; another program (out of memory, say) gets no clip refused.
            outcome = _run_child(request, folder, timeout_s=settings.timeout_s, memory_bytes=memory_bytes)
        if not (folder / RESULT).is_file():
            raise _verdict(outcome, settings.timeout_s)
        result = json.loads((folder / RESULT).read_bytes())
        if "reason" in result:
            raise MediaError(result["reason"], result["message"])
        return _unpack(result, (folder / MEMBERS).read_bytes())


def probe_isolated(
    paths: Sequence[Path],
    *,
    parts: Sequence[Sequence[Span]] = (),
    looks: bool = False,
    limits: VideoLimits,
    memory_bytes: int,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> list[Probed | MediaError]:
    """The header of each file and the frames of its `parts`, or why it has none; with `looks` also fingerprints.

    The files share a child until one of them kills it; that one gets a child of its own before it is blamed. The
    deadline grows with what there is to read.
    """
    asked = [list(spans) for spans in parts] or [[] for _ in paths]
    found: list[Probed | MediaError] = []
    size = len(paths)  # of the next child's share; 1 after a death
    while len(found) < len(paths):
        start, number = len(found), min(size, len(paths) - len(found))
        files = [
            {"path": str(path.absolute()), "parts": [asdict(span) for span in spans]}
            for path, spans in zip(paths[start : start + number], asked[start : start + number], strict=True)
        ]
        request = {"task": "probe", "files": files, "looks": looks, "limits": asdict(limits)}
        patience_s = timeout_s + sum(_patience_s(path) for path in paths[start : start + number])
        patience_s += PART_TIMEOUT_S * looks * sum(len(spans) for spans in asked[start : start + number])
        with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
            folder = Path(name)
            outcome = _run_child(request, folder, timeout_s=patience_s, memory_bytes=memory_bytes)
            answers = list(_read_headers(folder / RESULT))
        found += answers
        if len(answers) == number:
            size = len(paths)
        elif number == 1:
            found.append(_verdict(outcome, patience_s))
            size = len(paths)
        else:
            size = 1
    return found


def _patience_s(path: Path) -> float:
    """Seconds that reading a file may take on a slow disk."""
    try:
        return FILE_TIMEOUT_S + path.stat().st_size / SLOW_BYTES_PER_S
    except OSError:
        return FILE_TIMEOUT_S


def _run_child(request: dict[str, Any], folder: Path, *, timeout_s: float, memory_bytes: int) -> Outcome:
    (folder / "empty").mkdir(exist_ok=True)
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
    result |= {name: np.asarray(result[name], np.float64) for name in ARRAYS}
    return Transcoded(members=members, frame_numbers=tuple(result.pop("frame_numbers")), **result)


def _read_headers(path: Path) -> Iterator[Probed | MediaError]:
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        value = json.loads(line)
        if "reason" in value:
            yield MediaError(**value)
        else:
            yield Probed(VideoInfo(**value["info"]), tuple(value["counts"]), tuple(value["fingerprints"]))


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
    try:
        done = transcode_here(Path(request["path"]), TranscodeSettings(**values), Span(**request["span"]))
    except MediaError as error:
        result: dict[str, Any] = {"reason": error.reason, "message": error.message}
    else:
        with (folder / MEMBERS).open("wb") as stream:
            stream.writelines(done.members)
        result = {item.name: getattr(done, item.name) for item in fields(done) if item.name != "members"}
        result |= {name: result[name].tolist() for name in ARRAYS}
        result["sizes"] = [len(member) for member in done.members]
    # Renamed into place, so that a child killed while writing has given no answer.
    (folder / "result.part").write_text(json.dumps(result))
    (folder / "result.part").replace(folder / RESULT)


def _child_probe(request: dict[str, Any], folder: Path) -> None:
    limits = VideoLimits(**request["limits"])
    with (folder / RESULT).open("wb") as stream:
        for item in request["files"]:
            path = Path(item["path"])
            fault_point("ingest.probe", detail=item["path"])
            try:
                spans = [Span(**part) for part in item["parts"]]
                value = {
                    "info": asdict(probe(path, limits=limits)),
                    "counts": [_count(path, span, limits) for span in spans],
                    "fingerprints": [_look(path, span, limits) for span in spans] if request["looks"] else [],
                }
            except MediaError as error:
                value = {"reason": error.reason, "message": error.message}
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()


def _count(path: Path, span: Span, limits: VideoLimits) -> int:
    try:
        return part_of(timeline_of(path, limits), span)[1]
    except MediaError:
        return 0  # the build says what is wrong with it


def _look(path: Path, span: Span, limits: VideoLimits) -> str:
    try:
        return fingerprint(path, span=span, limits=limits)
    except MediaError:
        return ""  # the build says what is wrong with it


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
