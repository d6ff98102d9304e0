"""A data set's manifest as the page shows it: statistics, and the quarantine table with thumbnails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaluation.report.assets import THUMBNAIL_SIDE, Asset, AssetBox
from evaluation.report.frames import first_frame_at, stays_inside
from evaluation.report.inputs import DatasetInput, ReportInputs
from evaluation.report.text import grouped, show, size
from infra import storage
from infra.errors import ForeframeError
from ingest.reader import ShardDataset, load_manifest
from ingest.schema import Failure, Manifest

log = logging.getLogger(__name__)

MAX_LISTED = 200
MIN_LISTED = 10  # of each reason, however many there are
MAX_SAMPLES = 12
SAMPLE_SIDE = 220
# A file refused for one of these has no picture to show, or hurt the decoder once already.
NO_PICTURE = frozenset(
    {
        "not_found",
        "hostile_container",
        "download_refused",
        "download_failed",
        "empty",
        "not_video",
        "no_video_stream",
        "too_large",
        "crash",
        "timeout",
        "unreadable",
    }
)

REASON_WORDS = {
    "not_found": "there is no such file or address",
    "empty": "the file holds no bytes",
    "not_video": "the content is no accepted video container, whatever the name says",
    "hostile_container": "a playlist or script that would open other files or addresses",
    "truncated": "the container or stream ends early",
    "short_decode": "fewer frames decoded than declared",
    "wrong_duration": "its length is not the declared one, or the clip lies outside of it",
    "no_video_stream": "no video stream inside",
    "too_large": "pixels times frames exceed the recipe's bound",
    "bad_timestamps": "timestamps do not increase",
    "bad_annotation": "the annotation is missing, malformed or disagrees with the video",
    "duplicate": "same content as an earlier clip",
    "near_duplicate": "looks like an earlier clip (a filter that the recipe asked for)",
    "frozen": "nothing moves in too much of it (a filter that the recipe asked for)",
    "black": "too much of it is black (a filter that the recipe asked for)",
    "download_refused": "an address that is not asked: private network, scheme, redirects",
    "download_failed": "server or network failed after the bounded retries",
    "crash": "the decoder died in the isolated second attempt",
    "timeout": "the decoder hung in the isolated second attempt",
    "unreadable": "storage could not deliver the file, or it is not the planned one",
    "decode_error": "any other decoder error",
}


@dataclass(frozen=True)
class FailureRow:
    """One quarantined source."""

    path: str
    source_id: str
    stage: str
    reason: str
    message: str
    sha256: str
    thumbnail: Asset | None
    num_clips: int = 1


@dataclass(frozen=True)
class FailureGroup:
    """All clips refused for one reason. Clips of one source that say the same share a row; `rows` may not be all."""

    reason: str
    words: str
    count: int
    num_rows: int
    rows: tuple[FailureRow, ...]


@dataclass(frozen=True)
class SamplePicture:
    """One stored frame of a sample and what it belongs to."""

    picture: Asset
    caption: str


@dataclass(frozen=True)
class DatasetView:
    """What the page shows of one data set."""

    name: str
    version: str
    facts: tuple[tuple[str, str], ...]
    statistics: tuple[tuple[str, str], ...]
    reasons: tuple[tuple[str, int, str], ...]
    failures: tuple[FailureRow, ...]
    num_failures: int
    samples: tuple[SamplePicture, ...]
    notes: tuple[str, ...]


def dataset_view(
    data: DatasetInput, inputs: ReportInputs, box: AssetBox, *, thumbnails: Mapping[str, bytes]
) -> DatasetView:
    """Read a manifest and the pictures that go with it; raises `InputError` when there is no valid manifest."""
    url = inputs.at(data.url)
    manifest, version = load_manifest(url)
    failures = [failure for receipt in manifest.receipts for failure in receipt.failures]
    source = inputs.at(data.source) if data.source else ""
    rows = tuple(_failure_row(failure, source, box, thumbnails) for failure in failures[:MAX_LISTED])
    samples, notes = _sample_pictures(url, box)
    if len(failures) > MAX_LISTED:
        notes.append(f"The first {MAX_LISTED} of {len(failures)} quarantined sources are listed.")
    counted = Counter(failure.reason for failure in failures).most_common()
    return DatasetView(
        name=data.name or manifest.name,
        version=version,
        facts=_facts(manifest),
        statistics=tuple((key, show(value)) for key, value in _flatten(manifest.statistics)),
        reasons=tuple((reason, count, REASON_WORDS[reason]) for reason, count in counted),
        failures=rows,
        num_failures=len(failures),
        samples=samples,
        notes=tuple(notes),
    )


def engine_words(manifest: Manifest) -> str:
    """The versions that decided the bytes of the first shard."""
    engine = next((receipt.engine for receipt in manifest.receipts), {})
    return ", ".join(f"{name} {version}" for name, version in sorted(engine.items())) or "–"


def failure_groups(
    failures: Sequence[Failure], source: str, box: AssetBox, thumbnails: Mapping[str, bytes]
) -> tuple[FailureGroup, ...]:
    """The failures by reason, the most frequent one first; of a long ledger each reason lists some of its sources."""
    counted = Counter(failure.reason for failure in failures)
    limit = max(MAX_LISTED // max(len(counted), 1), MIN_LISTED)
    groups = []
    for reason, count in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        alike: dict[tuple[str, ...], list[Failure]] = {}
        for failure in failures:
            if failure.reason == reason:
                alike.setdefault((failure.path, failure.source_id, failure.stage, failure.message), []).append(failure)
        rows = tuple(
            replace(_failure_row(same[0], source, box, thumbnails), num_clips=len(same))
            for same in list(alike.values())[:limit]
        )
        groups.append(FailureGroup(reason, REASON_WORDS[reason], count, len(alike), rows))
    return tuple(groups)


def _facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    return (
        ("corpus", manifest.corpus),
        ("layout", manifest.layout),
        ("samples", grouped(manifest.num_samples)),
        ("frames", grouped(manifest.num_frames)),
        ("quarantined", grouped(manifest.num_failures)),
        ("shards", grouped(len(manifest.receipts))),
        ("size", size(sum(receipt.tar_bytes for receipt in manifest.receipts))),
        ("source videos", grouped(len(manifest.inputs))),
        ("engine", engine_words(manifest)),
        ("parent", manifest.parent or "none"),
    )


def _flatten(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(show(inner) for inner in value))]
    return [(prefix, value)]


def _failure_row(failure: Failure, source: str, box: AssetBox, thumbnails: Mapping[str, bytes]) -> FailureRow:
    given = thumbnails.get(failure.path)
    if given is not None:
        picture: Asset | None = box.inline(given, name=failure.path, kind="image")
    elif source and failure.reason not in NO_PICTURE:
        picture = _first_frame(source, failure.path, box)
    else:
        picture = None
    return FailureRow(
        path=failure.path,
        source_id=failure.source_id,
        stage=failure.stage,
        reason=failure.reason,
        message=failure.message,
        sha256=failure.sha256,
        thumbnail=picture if picture and picture.uri else None,
    )


def _first_frame(source: str, path: str, box: AssetBox) -> Asset | None:
    if not stays_inside(path):
        return None
    frame = first_frame_at(storage.join(source, path))
    return None if frame is None else box.pixels(frame, name=f"first frame of {path}", max_side=THUMBNAIL_SIDE)


def _sample_pictures(url: str, box: AssetBox) -> tuple[tuple[SamplePicture, ...], list[str]]:
    """The middle frame of samples spread evenly over the data set."""
    pictures: list[SamplePicture] = []
    try:
        data = ShardDataset(url)
        shown = min(MAX_SAMPLES, len(data))
        for index in (position * len(data) // shown for position in range(shown)):
            image = data.frames(index, [data.num_frames(index) // 2])[0]
            record = data.record(index)
            caption = data.text(index) or record.label or record.source_id
            pictures.append(SamplePicture(box.pixels(image, name=record.key, max_side=SAMPLE_SIDE), caption))
    except (ForeframeError, OSError) as error:
        log.warning("report: samples of %s: %s", url, error)
        return tuple(pictures), [f"Samples could not be read: {error}"]
    return tuple(pictures), []
