"""Source videos on their way in: fetched, hashed, and their headers read before the plan is made."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.digests import sha256_file
from infra.errors import ForeframeError
from infra.media import MediaError, VideoInfo
from infra.storage import get_file, is_remote, join
from ingest.isolate import probe_isolated
from ingest.plan import InspectedClip, VideoHeader, failure_of
from ingest.recipe import Recipe
from ingest.schema import Clip, SourceVideo

log = logging.getLogger(__name__)

CLIPS_PER_CHILD = 256  # one child reads the headers of that many clips
REMOTE_CLIPS_PER_CHILD = 16  # these are all on the local disk at once
THREADS = 4


@contextlib.contextmanager
def fetched(root: str, path: str) -> Iterator[Path]:
    """A local file with the source's content: itself, or a copy that goes away. Raises `MediaError("unreadable")`."""
    if not is_remote(root):
        local = Path(root) / path
        if not local.is_file():
            raise MediaError("unreadable", "there is no such file")
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        local = Path(folder) / f"source{Path(path).suffix}"
        _fetch(root, path, local)
        yield local


def check_content(local: Path, video: SourceVideo) -> None:
    """Raises `MediaError("unreadable")` unless the file is still the planned one."""
    try:
        found = sha256_file(local)
    except OSError as error:
        raise MediaError("unreadable", f"the file cannot be read: {error.strerror}") from None
    if found != video.sha256:
        raise MediaError("unreadable", "the content is not the one that was planned")


def inspect_clips(root: str, clips: Sequence[Clip], recipe: Recipe) -> list[InspectedClip]:
    """Hash and read the header of every source video; a clip that cannot be read carries its failure."""
    refused = [_refused(clip) for clip in clips if clip.refused is not None]
    clips = [clip for clip in clips if clip.refused is None]
    size = REMOTE_CLIPS_PER_CHILD if is_remote(root) else CLIPS_PER_CHILD
    chunks = [clips[start : start + size] for start in range(0, len(clips), size)]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda chunk: _inspect_chunk(root, chunk, recipe), chunks))
    log.info("inspected %d clips in %s", len(clips), root)
    return [*refused, *(item for chunk in results for item in chunk)]


def _refused(clip: Clip) -> InspectedClip:
    """A clip whose download failed: there is nothing to look at."""
    reason, message = clip.refused or ("download_failed", "")
    return InspectedClip(clip=clip, failure=failure_of(clip, stage="download", reason=reason, message=message))


def _inspect_chunk(root: str, clips: Sequence[Clip], recipe: Recipe) -> list[InspectedClip]:
    videos = [video for clip in clips for video in clip.videos]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        opened = [_open(stack, root, video) for video in videos]
        hashed = list(pool.map(_hash, videos, opened))
        readable = [place for place in opened if isinstance(place, Path)]
        headers = iter(probe_isolated(readable, limits=recipe.limits(), memory_bytes=recipe.item_memory_bytes))
        known = [next(headers) if isinstance(place, Path) else place for place in opened]
    results = iter(zip(hashed, known, strict=True))
    return [_inspected(clip, [next(results) for _ in clip.videos]) for clip in clips]


def _open(stack: contextlib.ExitStack, root: str, video: SourceVideo) -> Path | MediaError:
    try:
        return stack.enter_context(fetched(root, video.path))
    except MediaError as error:
        return error


def _hash(video: SourceVideo, place: Path | MediaError) -> SourceVideo:
    if isinstance(place, MediaError):
        return video
    try:
        return video.model_copy(update={"sha256": sha256_file(place), "size_bytes": place.stat().st_size})
    except OSError:
        return video  # the build finds it unreadable


def _inspected(clip: Clip, results: list[tuple[SourceVideo, VideoInfo | MediaError]]) -> InspectedClip:
    hashed = clip.model_copy(update={"videos": tuple(video for video, _ in results)})
    for number, (_, found) in enumerate(results):
        # Only what may not be tried again: every other error gets its exact reason from the build.
        if isinstance(found, MediaError) and found.reason in {"unreadable", "crash", "timeout"}:
            stage = "read" if found.reason == "unreadable" else "plan"
            failure = failure_of(hashed, stage=stage, reason=found.reason, message=found.message, video=number)
            return InspectedClip(clip=hashed, failure=failure)
    return InspectedClip(clip=hashed, headers=tuple(_header(found) for _, found in results))


def _header(found: VideoInfo | MediaError) -> VideoHeader | None:
    if isinstance(found, MediaError):
        return None
    return VideoHeader(width=found.width, height=found.height, fps=found.fps, num_frames=found.estimated_frames)


def _fetch(root: str, path: str, local: Path) -> None:
    try:
        get_file(join(root, path), local)
    except ForeframeError as error:
        if error.retryable:
            raise  # the store is down: that is no property of the video
        raise MediaError("unreadable", "there is no such file") from None
