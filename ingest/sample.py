"""From a planned clip to the members of its sample, or to the one failure that says why not."""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra.digests import pretty_json
from infra.errors import InputError
from infra.media import MediaError
from infra.media_transcode import WHOLE, Span, Transcoded
from ingest.cache import ShardCache
from ingest.corpora import Arrays, corpus_module
from ingest.inspected import failure_of, is_part
from ingest.plan import PlannedClip
from ingest.recipe import Recipe
from ingest.schema import CameraRecord, Failure, SampleRecord, SourceVideo, frame_suffix, video_suffix
from ingest.shard import Member
from ingest.sources import opened, span_of

HEADER_REASONS = frozenset(
    {"empty", "not_video", "hostile_container", "truncated", "no_video_stream", "too_large", "wrong_duration"}
)
READ_REASONS = frozenset({"not_found", "unreadable"})
STILL_LEVEL = 0.5  # mean luma levels of 255 that must change for a frame to count as different
BLACK_LEVEL = 10.0
Encode = Callable[[Path, Span], Transcoded]


@dataclass(frozen=True)
class Workshop:
    """Where samples are made: the corpus and the recipe; `seconds` adds up where the time went."""

    root: str
    corpus: str
    recipe: Recipe
    cache: ShardCache
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class ClipError(Exception):
    """A clip that becomes a failure; holds the ledger's entry."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


def build_sample(planned: PlannedClip, shop: Workshop, encode: Encode) -> tuple[SampleRecord, list[Member]]:
    """Decode and encode all cameras of a clip and add its words and arrays. Raises `ClipError`."""
    if not planned.clip.videos:
        raise _error(planned, "annotation", "bad_annotation", planned.clip.problem or "the clip names no video")
    # Pixels first: a broken video says so even if its annotation is broken too.
    cameras = [_encode_camera(planned, number, shop, encode) for number in range(len(planned.clip.videos))]
    _check_annotation(planned, cameras)
    _filter(planned, cameras[0], shop.recipe)
    started = time.perf_counter()
    arrays = _trajectory(planned, cameras, shop)
    shop.seconds["read"] += time.perf_counter() - started
    record = _record(planned, cameras, shop, has_arrays=bool(arrays))
    names = list(record.cameras)
    if shop.recipe.layout == "video":
        arrays = arrays | {"timestamps": cameras[0].timestamps_s}
        pixels = [Member(video_suffix(name), camera.members[0]) for name, camera in zip(names, cameras, strict=True)]
    else:
        pixels = [
            Member(frame_suffix(index, name), data, number)
            for name, camera in zip(names, cameras, strict=True)
            for index, (data, number) in enumerate(zip(camera.members, camera.frame_numbers, strict=True))
        ]
    members = [Member("json", pretty_json(record.to_json())), *pixels]
    if record.text:
        members.append(Member("txt", record.text.encode()))
    if arrays:
        members.append(Member("npz", pack_arrays(arrays)))
    return record, members


def pack_arrays(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """An npz whose bytes follow from the arrays: sorted names, numpy's fixed date."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]
    return buffer.getvalue()


def _encode_camera(planned: PlannedClip, number: int, shop: Workshop, encode: Encode) -> Transcoded:
    clip, video = planned.clip, planned.clip.videos[number]
    span = span_of(clip, video, planned.first_frame, planned.end_frame)
    shared = shop.cache if span != WHOLE else None
    started = time.perf_counter()
    try:
        with opened(shop.root, shop.corpus, clip, video, shared=shared) as (local, sha256):
            if sha256 != video.sha256:
                raise MediaError("unreadable", "the content is not the one that was planned")
            read = time.perf_counter()
            encoded = encode(local, span)
    except MediaError as error:
        stage = "probe" if error.reason in HEADER_REASONS else "read" if error.reason in READ_REASONS else "decode"
        raise _error(planned, stage, error.reason, error.message, number) from None
    shop.seconds["read"] += read - started
    for stage, seconds in encoded.seconds.items():
        shop.seconds[stage] += seconds
    return encoded


def _filter(planned: PlannedClip, camera: Transcoded, recipe: Recipe) -> None:
    """What the recipe's filters say of the first camera's stored frames."""
    if recipe.max_black_share is not None:
        share = float(np.mean(camera.brightness < BLACK_LEVEL))
        if share > recipe.max_black_share:
            raise _error(planned, "filter", "black", f"{share:.0%} of its frames are black")
    if recipe.max_frozen_share is not None and len(camera.change):
        share = float(np.mean(camera.change < STILL_LEVEL))
        if share > recipe.max_frozen_share:
            raise _error(planned, "filter", "frozen", f"nothing moves in {share:.0%} of its frames")


def _check_annotation(planned: PlannedClip, cameras: list[Transcoded]) -> None:
    clip = planned.clip
    if clip.problem:
        raise _error(planned, "annotation", "bad_annotation", clip.problem)
    for number, camera in enumerate(cameras):
        declared = clip.declared_num_frames
        message = f"the annotation declares {declared} frames, the video has {camera.source_frames}"
        if declared is not None and camera.source_frames < declared:
            raise _error(planned, "decode", "short_decode", message, number)
        if declared is not None and camera.source_frames > declared:
            raise _error(planned, "annotation", "bad_annotation", message, number)
    if len({len(camera.frame_numbers) for camera in cameras}) > 1:
        counts = ", ".join(str(camera.source_frames) for camera in cameras)
        raise _error(planned, "annotation", "bad_annotation", f"its cameras have different numbers of frames: {counts}")


def _trajectory(planned: PlannedClip, cameras: list[Transcoded], shop: Workshop) -> Arrays:
    """The span's part of the arrays, at the source's rate whatever the stride."""
    if not planned.clip.trajectory:
        return {}
    try:
        arrays = corpus_module(shop.corpus).read_trajectory(shop.root, planned.clip)
    except PermissionError:
        raise _error(planned, "annotation", "bad_annotation", f"{planned.clip.trajectory} may not be read") from None
    except InputError as error:
        # The remedy and the place are the reader's; the record keeps what does not depend on where the corpus lies.
        raise _error(
            planned, "annotation", "bad_annotation", error.message.replace(shop.root, "").lstrip("/")
        ) from None
    frames = cameras[0].source_frames
    for name, values in arrays.items():
        if values.ndim == 0 or len(values) not in (frames - 1, frames):
            message = f"{name} has shape {tuple(values.shape)} for {frames} frames"
            raise _error(planned, "annotation", "bad_annotation", message)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _error(planned, "annotation", "bad_annotation", f"{name} is not finite everywhere")
    return {name: values[planned.first_frame : planned.end_frame] for name, values in arrays.items()}


def _record(planned: PlannedClip, cameras: list[Transcoded], shop: Workshop, *, has_arrays: bool) -> SampleRecord:
    clip = planned.clip
    stored = {
        video.camera: _camera_record(planned, video, camera) for video, camera in zip(clip.videos, cameras, strict=True)
    }
    whole = planned.first_frame == 0 and planned.end_frame is None
    first = clip.videos[0]
    start_s, end_s = (first.start_s, first.end_s) if is_part(first) else (clip.start_s, clip.end_s)
    times = cameras[0].timestamps_s + (start_s or 0.0)
    return SampleRecord(
        key=planned.key,
        source_id=clip.source_id,
        corpus=shop.corpus,
        layout=shop.recipe.layout,
        cameras=stored,
        start_s=start_s if whole else float(times[0]),
        end_s=end_s if whole else float(times[-1]) + 1 / cameras[0].fps,
        text=clip.text,
        label=clip.label,
        has_arrays=has_arrays,
        metadata={**clip.metadata, "split": planned.split},
    )


def _camera_record(planned: PlannedClip, video: SourceVideo, camera: Transcoded) -> CameraRecord:
    annotated = planned.clip.declared_num_frames is not None
    return CameraRecord(
        source=video,
        width=camera.width,
        height=camera.height,
        fps=camera.fps,
        num_frames=len(camera.frame_numbers),
        frame_numbers=_numbers(camera),
        length="annotated" if annotated else "declared" if camera.declares_length else "unverified",
        motion=round(float(camera.change.mean()), 3) if len(camera.change) else None,
        brightness=round(float(camera.brightness.mean()), 3),
    )


def _numbers(camera: Transcoded) -> tuple[int, ...] | None:
    return None if camera.frame_numbers == tuple(range(len(camera.frame_numbers))) else camera.frame_numbers


def _error(planned: PlannedClip, stage: str, reason: str, message: str, video: int = 0) -> ClipError:
    first = planned.first_frame
    return ClipError(
        failure_of(planned.clip, stage=stage, reason=reason, message=message, video=video, first_frame=first)
    )
