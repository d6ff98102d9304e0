"""Source videos on their way in: fetched, hashed, and their headers read before the plan is made."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import cast

from infra.digests import sha256_file
from infra.errors import ForeframeError, InputError
from infra.media import MediaError
from infra.media_pictures import SUFFIX, join_pictures
from infra.media_transcode import Span
from infra.storage import get_file, is_remote, join
from ingest.cache import ShardCache
from ingest.corpora import PictureCorpus, corpus_module
from ingest.inspected import InspectedClip, VideoHeader, failure_of, is_part
from ingest.isolate import Probed, probe_isolated
from ingest.recipe import Recipe
from ingest.schema import Clip, SourceVideo

log = logging.getLogger(__name__)

FILES_PER_CHILD = 256  # one child reads that many headers
COPIES_PER_CHILD = 16  # of remote files and of joined pictures, which are all on the local disk at once
THREADS = 4
Found = tuple[SourceVideo, Probed | MediaError]


@contextlib.contextmanager
def opened(
    root: str, corpus: str, clip: Clip, video: SourceVideo, *, shared: ShardCache | None = None
) -> Iterator[tuple[Path, str]]:
    """(local file, sha256 of its content): the source itself, a copy that goes away, or its pictures joined.

    A remote file that several samples are cut from comes through `shared`, once per node. Raises `MediaError`.
    """
    if video.pictures:
        with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
            local = Path(folder) / f"pictures{SUFFIX}"
            yield local, _join(root, corpus, clip, video, local)
        return
    if not is_remote(root):
        local = Path(root) / video.path
        yield local, _hash_of(local)
        return
    if shared is not None and video.sha256:
        with tempfile.TemporaryDirectory(prefix="foreframe-", dir=shared.folder_for_links()) as folder:
            yield _cached(root, video, shared, Path(folder)), video.sha256
        return
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        local = Path(folder) / f"source{Path(video.path).suffix}"
        _fetch(root, video.path, local)
        yield local, sha256_file(local)


def span_of(clip: Clip, video: SourceVideo, first: int = 0, end: int | None = None) -> Span:
    """Frames of the part of a file that is a clip's: the camera's own seconds go before the clip's."""
    own = is_part(video)
    return Span(first, end, video.start_s if own else clip.start_s, video.end_s if own else clip.end_s)


def inspect_clips(root: str, clips: Sequence[Clip], recipe: Recipe, corpus: str) -> list[InspectedClip]:
    """Hash and read the header of every source, each file once; a clip that cannot be read carries its failure."""
    refused = [_refused(clip) for clip in clips if clip.refused is not None]
    clips = [clip for clip in clips if clip.refused is None]
    sources = {_identity(clip, video): (clip, video) for clip in clips for video in clip.videos}
    parts: dict[tuple[str, str], dict[Span, None]] = {key: {} for key in sources}
    for clip in clips:
        for video in clip.videos[:1]:
            parts[_identity(clip, video)][span_of(clip, video)] = None
    keys = list(sources)
    copied = is_remote(root) or any(video.pictures for _, video in sources.values())
    size = COPIES_PER_CHILD if copied else FILES_PER_CHILD
    chunks = [keys[start : start + size] for start in range(0, len(keys), size)]

    def inspect(chunk: list[tuple[str, str]]) -> list[Found]:
        return _inspect(root, corpus, [sources[key] for key in chunk], [list(parts[key]) for key in chunk], recipe)

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(keys, (item for chunk in pool.map(inspect, chunks) for item in chunk), strict=True))
    log.info("inspected %d clips, %d sources in %s", len(clips), len(keys), root)
    looks = {key: list(spans) for key, spans in parts.items()}
    return [*refused, *(_inspected(clip, [(found[key], looks[key]) for key in _keys(clip)]) for clip in clips)]


def _refused(clip: Clip) -> InspectedClip:
    """A clip whose download failed: there is nothing to look at."""
    reason, message = clip.refused or ("download_failed", "")
    return InspectedClip(clip=clip, failure=failure_of(clip, stage="download", reason=reason, message=message))


def _identity(clip: Clip, video: SourceVideo) -> tuple[str, str]:
    """What is read once: a file, or the pictures of one camera of one clip."""
    return (clip.source_id, video.camera) if video.pictures else ("", video.path)


def _keys(clip: Clip) -> list[tuple[str, str]]:
    return [_identity(clip, video) for video in clip.videos]


def _inspect(
    root: str, corpus: str, sources: list[tuple[Clip, SourceVideo]], parts: list[list[Span]], recipe: Recipe
) -> list[Found]:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        places = list(pool.map(lambda source: _open(stack, root, corpus, *source), sources))
        readable = [(place[0], spans) for place, spans in zip(places, parts, strict=True) if isinstance(place, tuple)]
        headers = iter(
            probe_isolated(
                [path for path, _ in readable],
                parts=[spans for _, spans in readable],
                looks=recipe.near_duplicate_bits is not None,
                limits=recipe.limits(),
                memory_bytes=recipe.item_memory_bytes,
            )
        )
        return [
            (_described(video, place), next(headers) if isinstance(place, tuple) else place)
            for (_, video), place in zip(sources, places, strict=True)
        ]


def _open(
    stack: contextlib.ExitStack, root: str, corpus: str, clip: Clip, video: SourceVideo
) -> tuple[Path, str] | MediaError:
    try:
        return stack.enter_context(opened(root, corpus, clip, video))
    except MediaError as error:
        return error


def _described(video: SourceVideo, place: tuple[Path, str] | MediaError) -> SourceVideo:
    if isinstance(place, MediaError):
        return video
    return video.model_copy(update={"sha256": place[1], "size_bytes": place[0].stat().st_size})


def _inspected(clip: Clip, results: list[tuple[Found, list[Span]]]) -> InspectedClip:
    updates = [{"sha256": found.sha256, "size_bytes": found.size_bytes} for (found, _), _ in results]
    videos = tuple(video.model_copy(update=update) for video, update in zip(clip.videos, updates, strict=True))
    described = clip.model_copy(update={"videos": videos})
    for number, ((_, found), _) in enumerate(results):
        # Only what may not be tried again: every other error gets its exact reason from the build.
        if isinstance(found, MediaError) and found.reason in {"not_found", "unreadable", "crash", "timeout"}:
            stage = "read" if found.reason in {"not_found", "unreadable"} else "plan"
            failure = failure_of(described, stage=stage, reason=found.reason, message=found.message, video=number)
            return InspectedClip(clip=described, failure=failure)
    headers = [_header(found) for (_, found), _ in results]
    look = ""
    if results and isinstance(first := results[0][0][1], Probed) and headers[0] is not None:
        place = results[0][1].index(span_of(clip, clip.videos[0]))
        headers[0] = headers[0].model_copy(update={"num_frames": first.counts[place]})
        look = first.fingerprints[place] if first.fingerprints else ""
    return InspectedClip(clip=described, headers=tuple(headers), fingerprint=look)


def _header(found: Probed | MediaError) -> VideoHeader | None:
    if isinstance(found, MediaError):
        return None
    info = found.info
    return VideoHeader(width=info.width, height=info.height, fps=info.fps, num_frames=info.estimated_frames)


def _join(root: str, corpus: str, clip: Clip, video: SourceVideo, local: Path) -> str:
    module = cast(PictureCorpus, corpus_module(corpus))
    try:
        return join_pictures(module.read_pictures(root, clip, video), local)
    except InputError as error:
        raise MediaError("unreadable", error.message.replace(root, "").lstrip("/")) from None
    except PermissionError:
        raise MediaError("unreadable", "it may not be read") from None


def _hash_of(path: Path) -> str:
    try:
        status = path.stat()
        return _hashed(path, status.st_mtime_ns, status.st_size, status.st_ino)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MediaError("not_found", "there is no such file") from None
    except PermissionError:
        raise MediaError("unreadable", "it may not be read") from None
    except OSError as error:
        raise MediaError("unreadable", f"the file cannot be read: {error.strerror}") from None


@lru_cache(maxsize=4096)
def _hashed(path: Path, _modified_ns: int, _size: int, _inode: int) -> str:
    """Remembered, since many clips may share one file."""
    return sha256_file(path)


def _cached(root: str, video: SourceVideo, cache: ShardCache, folder: Path) -> Path:
    """A name of our own for the cached file, which stays when the cache needs the room."""
    try:
        return cache.link(join(root, video.path), sha256=video.sha256, folder=folder)
    except ForeframeError as error:
        if error.retryable:
            raise
        raise MediaError("unreadable", "the content is not the one that was planned, or gone") from None
    except PermissionError:
        raise MediaError("unreadable", "it may not be read") from None


def _fetch(root: str, path: str, local: Path) -> None:
    try:
        get_file(join(root, path), local)
    except ForeframeError as error:
        if error.retryable:
            raise  # the store is down: that is no property of the video
        raise MediaError("not_found", "there is no such file") from None
    except PermissionError:
        raise MediaError("unreadable", "it may not be read") from None
