"""RLDS episodes as tensorflow_datasets writes them, among them Open X-Embodiment; one data set or several below a root.

    [NAME/VERSION/]features.json, dataset_info.json, NAME-SPLIT.tfrecord-00000-of-00005

Listing reads every file once, an episode at a time. A clip remembers where its record lies, and only that is read
again. A camera's frames are the JPEGs or PNGs of the record as they are; depth maps and grey pictures are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import InputError
from infra.media_pictures import Pictures
from infra.storage import join, list_names
from ingest.corpora.rlds_features import EPISODE, FEATURES, STEPS, Features, control_rate, read_features
from ingest.corpora.tables import read_object
from ingest.corpora.tf_example import Feature, parse_example
from ingest.corpora.tfrecord import Record, iterate_records, read_record, record_address
from ingest.schema import Clip, SourceVideo

INFO = "dataset_info.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord(?:-(?P<number>\d{5,8})-of-(?P<count>\d{5,8}))?")
MAX_FACT_LETTERS = 1000
EXPECTED = f"Expected [NAME/VERSION/]{FEATURES} and, beside it, NAME-SPLIT.tfrecord-00000-of-00005."


@dataclass(frozen=True)
class _Shard:
    """One file of a data set."""

    path: str
    split: str
    stem: str  # of its episodes' source ids
    num_episodes: int | None  # by dataset_info.json


@dataclass(frozen=True)
class _DataSet:
    """One folder with a features.json."""

    name: str
    features: Features
    shards: tuple[_Shard, ...]
    lost: tuple[Clip, ...]  # what stands for files that are not there

    def metadata(self, split: str) -> dict[str, Any]:
        """What all episodes of a split have in common."""
        fps, source = control_rate(self.name)
        features = self.features
        optional = {
            "left_out": list(features.left_out),
            "actions": {key.removeprefix(STEPS): size for key, size in features.actions.items()},
            "proprioception": {key.removeprefix(STEPS): size for key, size in features.proprioception.items()},
        }
        known = {"dataset": self.name, "source_split": split, "fps": fps, "fps_source": source}
        return known | {key: value for key, value in optional.items() if value}


def list_clips(root: str) -> list[Clip]:
    """One clip per episode; a damaged record, the rest of a cut file and files that are not there are clips as well."""
    names = list_names(root, recursive=True)
    folders = [str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == FEATURES]
    if not folders:
        raise InputError(f"{root} holds no {FEATURES}.", remedy=EXPECTED)
    sets = [_read_set(root, "" if folder == "." else folder, names) for folder in folders]
    if not any(data.shards for data in sets):
        raise InputError(f"{root} holds no TFRecord file.", remedy=EXPECTED)
    clips = [clip for data in sets for clip in data.lost]
    clips += [clip for data in sets for shard in data.shards for clip in _episodes(root, data, shard)]
    return sorted(clips, key=lambda clip: clip.source_id)


def read_trajectory(root: str, clip: Clip) -> dict[str, npt.NDArray[np.generic]]:
    """actions (T, A) and proprioception (T, P), those of them that the data set has: float32.

    Actions in parts are joined in the order of their names, which the clip's metadata give with their sizes. Raises
    `InputError` where the record is damaged or has other numbers of values.
    """
    content, _ = read_record(root, clip.trajectory)
    features = parse_example(content)
    num_steps = clip.declared_num_frames or 0
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name in ("actions", "proprioception"):
        parts: Mapping[str, int] = clip.metadata.get(name) or {}
        if parts:
            columns = [_column(features, f"{STEPS}{key}", num_steps, size) for key, size in sorted(parts.items())]
            arrays[name] = np.concatenate(columns, axis=1)
    return arrays


def read_pictures(root: str, clip: Clip, video: SourceVideo) -> Pictures:
    """JPEG or PNG bytes of one camera; the record is read with the first. Raises `InputError`, also while iterating."""
    return Pictures(_frames(root, video.path), float(clip.metadata["fps"]))


def _frames(root: str, address: str) -> Iterator[bytes]:
    content, key = read_record(root, address)
    feature = parse_example(content).get(key)
    if feature is None:
        raise InputError(f"{address}: the record has no feature {key!r}.")
    yield from feature.bytes_list()


def _column(features: Mapping[str, Feature], key: str, num_steps: int, size: int) -> npt.NDArray[np.float32]:
    feature = features.get(key)
    if feature is None:
        raise InputError(f"the record has no feature {key!r}.")
    values = np.asarray(feature.integers() if feature.kind == "integers" else feature.floats(), np.float32)
    if len(values) != num_steps * size:
        raise InputError(f"{key!r} has {len(values)} values where {num_steps} steps of {size} are due.")
    return values.reshape(num_steps, size)


def _read_set(root: str, folder: str, names: list[str]) -> _DataSet:
    inside = [name for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
    matches = {name: match for name in inside if (match := SHARD.fullmatch(PurePosixPath(name).name))}
    info = read_object(join(root, folder, INFO)) if f"{folder}/{INFO}".lstrip("/") in inside else {}
    stored = next((match["name"] for match in matches.values()), PurePosixPath(folder or root).name)
    name = info.get("name") if isinstance(info.get("name"), str) else stored
    lengths = _shard_lengths(info)
    prefix = f"{folder}/" if folder else ""
    shards = tuple(
        _Shard(place, match["split"], prefix + _stem(match), lengths.get((match["split"], int(match["number"] or 0))))
        for place, match in sorted(matches.items())
    )
    return _DataSet(str(name), read_features(root, folder), shards, tuple(_missing(prefix, list(matches.values()))))


def _stem(match: re.Match[str]) -> str:
    return match["split"] + (f"-{match['number']}-of-{match['count']}" if match["number"] else "")


def _shard_lengths(info: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """(split, number of the file) -> episodes."""
    found = {}
    splits = info.get("splits")
    for split in splits if isinstance(splits, list) else ():
        lengths = split.get("shardLengths") if isinstance(split, dict) else None
        for number, length in enumerate(lengths if isinstance(lengths, list) else ()):
            if str(length).isdecimal():
                found[str(split.get("name")), number] = int(length)
    return found


def _missing(prefix: str, matches: list[re.Match[str]]) -> Iterator[Clip]:
    """One clip for the files of a split that are not there."""
    for split, count in sorted({(match["split"], match["count"]) for match in matches if match["count"]}):
        there = {int(match["number"]) for match in matches if (match["split"], match["count"]) == (split, count)}
        first = next((number for number in range(int(count)) if number not in there), None)
        if first is not None:
            lost = int(count) - len([number for number in there if number < int(count)])
            problem = f"{lost} of {int(count)} files of {split} are missing, the first is number {first:05d}"
            yield Clip(source_id=f"{prefix}{split}-missing", videos=(), problem=problem)


def _episodes(root: str, data: _DataSet, shard: _Shard) -> Iterator[Clip]:
    count = 0
    for record in iterate_records(join(root, shard.path)):
        yield _clip(data, shard, count, record)
        count += 1
    if shard.num_episodes is not None and count != shard.num_episodes:
        problem = f"the file has {count} records, {INFO} says {shard.num_episodes}"
        yield Clip(source_id=f"{shard.stem}/{count:06d}-rest", videos=(), problem=problem)


def _clip(data: _DataSet, shard: _Shard, number: int, record: Record) -> Clip:
    videos = tuple(
        SourceVideo(camera=name, path=record_address(shard.path, record, key), pictures=True)
        for key, name in sorted(data.features.cameras.items())
    )
    metadata = data.metadata(shard.split)
    known: dict[str, Any] = {"source_id": f"{shard.stem}/{number:06d}", "label": data.name, "metadata": metadata}
    if record.problem:
        return Clip(videos=(), problem=record.problem, **known)
    try:
        features = parse_example(record.content)
        num_steps = _count_steps(features, data.features)
        text = _instruction(features, data.features)
        if facts := _facts(features, data.features):
            metadata["episode_metadata"] = facts
    except InputError as error:
        return Clip(videos=(), problem=error.message.rstrip("."), **known)
    has_arrays = bool(data.features.actions or data.features.proprioception)
    address = record_address(shard.path, record)
    return Clip(
        videos=videos, text=text, declared_num_frames=num_steps, trajectory=address if has_arrays else "", **known
    )


def _count_steps(features: Mapping[str, Feature], described: Features) -> int:
    """Pictures of each camera. `InputError` when the cameras have different numbers, or there is none."""
    if not described.cameras:
        raise InputError("the data set has no colour camera.")
    counts = {}
    for key in described.cameras:
        if key not in features:
            raise InputError(f"the record has no feature {key!r}.")
        counts[key] = features[key].num_bytes_values()
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key.removeprefix(STEPS)} {count}" for key, count in counts.items())
        raise InputError(f"its cameras have different numbers of pictures: {listed}.")
    return next(iter(counts.values()))


def _instruction(features: Mapping[str, Feature], described: Features) -> str:
    """The first words that are not empty."""
    for key, num_points in described.instructions.items():
        if key not in features:
            continue
        if num_points:
            encoded = b"".join(_encoded(point) for point in features[key].integers(num_points))
            texts = [encoded.decode()]
        else:
            texts = [_decoded(value, key) for value in features[key].bytes_list()]
        if text := next((text.strip() for text in texts if text.strip()), ""):
            return text
    return ""


def _facts(features: Mapping[str, Feature], described: Features) -> dict[str, Any]:
    """What the record says of the whole episode, as far as it is one short text or number each."""
    facts: dict[str, Any] = {}
    for key in described.facts:
        feature = features.get(key)
        if feature is None:
            continue
        if feature.kind == "bytes":
            values: list[Any] = [value.decode(errors="replace")[:MAX_FACT_LETTERS] for value in feature.bytes_list()]
        elif feature.kind == "integers":
            values = list(feature.integers(2))
        else:
            values = [float(value) for value in feature.floats()[:2]]
        if len(values) == 1:
            facts[key.removeprefix(EPISODE)] = values[0]
    return facts


def _decoded(value: bytes, key: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InputError(f"{key!r} is not UTF-8 text.") from None


def _encoded(point: int) -> bytes:
    """UTF-8 of a code point; nothing for the zeros that fill a list up, and for what is no letter."""
    return chr(point).encode(errors="ignore") if 0 < point < 0x110000 else b""
