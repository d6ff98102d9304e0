"""How long a data set took to build, from the logs beside its shards. Nothing hashes them: anything may be absent."""

from __future__ import annotations

import heapq
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from evaluation.report.charts import histogram, histogram_chart, number
from evaluation.report.text import cut, duration, grouped, rate
from infra import storage
from infra.errors import ForeframeError
from ingest.reader import ShardDataset
from ingest.schema import Manifest, Receipt, shard_name

log = logging.getLogger(__name__)

LOG_NAME = re.compile(r"shard-(\d{5,})\.log\.json")
STAGE_ORDER = ("read", "probe", "decode", "encode", "write", "hash", "commit")
MAX_SLOW = 12
MAX_REPEATED = 20
MAX_HOSTS = 20


@dataclass(frozen=True)
class ShardLog:
    """One `shard-NNNNN.log.json`; numbers that are not there or not sound are None or left out."""

    shard: int
    attempt: int
    host: str
    seconds: float | None
    finished_s: float | None
    stages: Mapping[str, float] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageTime:
    """Time of one stage over all shards."""

    name: str
    seconds: str
    share: float
    percent: str
    per_frame: str


@dataclass(frozen=True)
class HostTime:
    """What one machine built."""

    host: str
    shards: str
    frames: str
    seconds: str
    frames_per_s: str


@dataclass(frozen=True)
class SlowClip:
    """One of the clips that took longest."""

    name: str
    key: str
    shard: str
    seconds: str


@dataclass(frozen=True)
class RepeatedShard:
    """A shard that was not built at the first attempt."""

    shard: str
    attempts: int
    host: str
    seconds: str


@dataclass(frozen=True)
class TimesView:
    """Times and rates of the build."""

    figures: tuple[tuple[str, str, str], ...]
    stages: tuple[StageTime, ...]
    hosts: tuple[HostTime, ...]
    charts: tuple[tuple[str, Markup], ...]
    slowest: tuple[SlowClip, ...]
    repeated: tuple[RepeatedShard, ...]
    num_repeated: int


def read_logs(url: str, manifest: Manifest) -> tuple[list[ShardLog], list[str]]:
    """The logs of the manifest's shards, and what is to be said of absent ones."""
    wanted = {receipt.shard for receipt in manifest.receipts}
    matches = (LOG_NAME.fullmatch(name) for name in storage.list_names(url, suffix=".log.json"))
    found = sorted(int(match[1]) for match in matches if match and int(match[1]) in wanted)
    logs: list[ShardLog] = []
    broken = 0
    for shard in found:
        try:
            logs.append(_parse(shard, storage.read_json(storage.join(url, f"{shard_name(shard)}.log.json"))))
        except (ForeframeError, OSError, ValueError) as error:
            log.warning("report: log of %s: %s", shard_name(shard), error)
            broken += 1
    notes = []
    if len(found) < len(wanted):
        notes.append(f"{grouped(len(wanted) - len(found))} of {grouped(len(wanted))} shards have no build log.")
    if broken:
        notes.append(f"{grouped(broken)} build logs could not be read.")
    return logs, notes


def times_view(data: ShardDataset, logs: list[ShardLog]) -> TimesView:
    """Add up the logs; frames and seconds of source come from the receipts."""
    receipts = {receipt.shard: receipt for receipt in data.manifest.receipts}
    timed = [entry for entry in logs if entry.seconds]
    speeds = [receipts[entry.shard].num_frames / entry.seconds for entry in timed if entry.seconds]
    repeated = sorted((entry for entry in logs if entry.attempt), key=lambda entry: -entry.attempt)
    charts = (
        ("Seconds per shard", _chart([entry.seconds or 0.0 for entry in timed], "seconds")),
        ("Frames per second and worker", _chart(speeds, "frames a second")),
        ("Seconds per clip", _chart([value for entry in logs for value in entry.clips.values()], "seconds")),
    )
    return TimesView(
        figures=_figures(timed, receipts),
        stages=_stages(logs, receipts),
        hosts=_hosts(timed, receipts),
        charts=tuple((name, chart) for name, chart in charts if chart),
        slowest=_slowest(data, logs),
        repeated=tuple(
            RepeatedShard(shard_name(entry.shard), entry.attempt + 1, entry.host, duration(entry.seconds))
            for entry in repeated[:MAX_REPEATED]
        ),
        num_repeated=len(repeated),
    )


def _parse(shard: int, value: Any) -> ShardLog:
    if not isinstance(value, dict):
        raise ValueError(f"the log of {shard_name(shard)} is no object")
    attempt = value.get("attempt")
    return ShardLog(
        shard=shard,
        attempt=attempt if isinstance(attempt, int) and 0 < attempt < 10_000 else 0,
        host=cut(str(value.get("host") or "unknown"), limit=60),
        seconds=_seconds(value.get("seconds")),
        finished_s=_seconds(value.get("finished_unix_s")),
        stages=_numbers(value.get("stages")),
        clips=_numbers(value.get("seconds_per_clip")),
    )


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    found = {str(key): _seconds(item) for key, item in value.items()} if isinstance(value, dict) else {}
    return {key: item for key, item in found.items() if item is not None}


def _figures(timed: list[ShardLog], receipts: Mapping[int, Receipt]) -> tuple[tuple[str, str, str], ...]:
    """(number, what it is, what it rests on)."""
    if not timed:
        return ()
    worked = sum(entry.seconds or 0.0 for entry in timed)
    frames = sum(receipts[entry.shard].num_frames for entry in timed)
    clips = sum(receipts[entry.shard].num_samples for entry in timed)
    source_s = sum(_source_seconds(receipts[entry.shard]) for entry in timed)
    figures = [
        (duration(worked), "worker time", f"{grouped(len(timed))} shards"),
        (f"{number(frames / worked)}/s", "frames per worker", f"{grouped(frames)} frames"),
        (f"{number(clips / worked)}/s", "clips per worker", f"{grouped(clips)} clips"),
    ]
    if source_s:
        figures.append((f"{number(source_s / worked)}×", "real time per worker", f"{duration(source_s)} of video"))
    ended = [(entry.finished_s, entry.seconds) for entry in timed if entry.finished_s and entry.seconds is not None]
    if len(ended) == len(timed):
        elapsed = max(end for end, _ in ended) - min(end - seconds for end, seconds in ended)
        figures.append((duration(elapsed), "first start to last shard", "with every pause between"))
    return tuple(figures)


def _source_seconds(receipt: Receipt) -> float:
    milliseconds = receipt.statistics.get("milliseconds", 0)
    return milliseconds / 1000 if isinstance(milliseconds, int) else 0.0


def _stages(logs: list[ShardLog], receipts: Mapping[int, Receipt]) -> tuple[StageTime, ...]:
    """Stages in the order of the work; what no stage accounts for comes last."""
    staged = [entry for entry in logs if entry.stages]
    if not staged:
        return ()
    totals = defaultdict[str, float](float)
    for entry in staged:
        for name, seconds in entry.stages.items():
            totals[name] += seconds
    rest = sum(entry.seconds or 0.0 for entry in staged) - sum(totals.values())
    if rest > 0:
        totals["anything else"] = rest
    frames = sum(receipts[entry.shard].num_frames for entry in staged)
    known = [name for name in STAGE_ORDER if name in totals]
    order = [*known, *sorted(name for name in totals if name not in (*known, "anything else"))]
    order += ["anything else"] if "anything else" in totals else []
    whole, largest = sum(totals.values()) or 1.0, max(totals.values()) or 1.0
    return tuple(
        StageTime(
            name=cut(name, limit=40),
            seconds=_span(totals[name]),
            share=totals[name] / largest,
            percent=rate(totals[name] / whole),
            per_frame=f"{number(1000 * totals[name] / frames)} ms" if frames else "–",
        )
        for name in order
    )


def _span(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds < 10 else duration(seconds)


def _hosts(timed: list[ShardLog], receipts: Mapping[int, Receipt]) -> tuple[HostTime, ...]:
    seconds, frames, shards = defaultdict[str, float](float), Counter[str](), Counter[str]()
    for entry in timed:
        seconds[entry.host] += entry.seconds or 0.0
        frames[entry.host] += receipts[entry.shard].num_frames
        shards[entry.host] += 1
    return tuple(
        HostTime(
            host,
            grouped(shards[host]),
            grouped(frames[host]),
            duration(seconds[host]),
            number(frames[host] / seconds[host]),
        )
        for host, _ in shards.most_common(MAX_HOSTS)
    )


def _slowest(data: ShardDataset, logs: Iterable[ShardLog]) -> tuple[SlowClip, ...]:
    every = ((value, key, entry.shard) for entry in logs for key, value in entry.clips.items())
    return tuple(
        SlowClip(_name(data, shard, key), cut(key, limit=40), shard_name(shard), f"{number(value)} s")
        for value, key, shard in heapq.nlargest(MAX_SLOW, every)
    )


def _name(data: ShardDataset, shard: int, key: str) -> str:
    """What the clip is called in the corpus; a remote shard is not fetched to find out."""
    position = next(number for number, receipt in enumerate(data.manifest.receipts) if receipt.shard == shard)
    receipt = data.manifest.receipts[position]
    refused = next((failure for failure in receipt.failures if failure.key == key), None)
    if refused is not None:
        return f"{cut(refused.source_id, limit=80)} ({refused.reason})"
    if storage.is_remote(data.url):
        return ""
    start = sum(data.shard_sizes[:position])
    try:
        keys = (index for index in range(start, start + receipt.num_samples) if data.key(index) == key)
        index = next(keys, None)
        return "" if index is None else cut(data.record(index).source_id, limit=80)
    except (ForeframeError, OSError) as error:
        log.debug("report: name of %s: %s", key, error)
        return ""


def _chart(values: list[float], unit: str) -> Markup:
    return histogram_chart(histogram(values), title=unit, x_label=unit)
