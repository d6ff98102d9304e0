"""Histograms of a data set: lengths, rates, sizes, motion, brightness."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evaluation.report.charts import bar_chart, histogram, histogram_chart, number
from evaluation.report.samples import Samples
from evaluation.report.text import grouped
from ingest.schema import Manifest

MAX_BARS = 8


@dataclass(frozen=True)
class Distribution:
    """One small chart. `absent` says why there is none."""

    name: str
    chart: Markup
    facts: str = ""
    absent: str = ""


def distributions(manifest: Manifest, samples: Samples) -> tuple[Distribution, ...]:
    """Sizes and rates come from the manifest, everything else from the samples that were looked at."""
    sizes = counts(manifest, "size") or Counter(camera.size for sample in samples.facts for camera in sample.cameras)
    rates = counts(manifest, "fps") or Counter(
        f"{camera.fps:g}" for sample in samples.facts for camera in sample.cameras
    )
    return (
        _histogram("Clip length", [sample.seconds for sample in samples.facts], "seconds"),
        _histogram(
            "Frames per clip", [float(sample.cameras[0].num_frames) for sample in samples.facts], "frames", whole=True
        ),
        _bars("Frames per second", {f"{rate} fps": count for rate, count in rates.items()}, "rate"),
        _bars("Stored size", {size.replace("x", " × "): count for size, count in sizes.items()}, "size"),
        _measured("Motion", samples.cameras(lambda camera: camera.motion), samples, "luma levels a frame"),
        _measured("Brightness", samples.cameras(lambda camera: camera.brightness), samples, "luma level, 0 to 255"),
    )


def counts(manifest: Manifest, name: str) -> Counter[str]:
    """One of the counts that the manifest's statistics add up, empty when it has none of that name."""
    found: Any = manifest.statistics.get(name)
    if not isinstance(found, Mapping):
        return Counter()
    return Counter({str(key): value for key, value in found.items() if isinstance(value, int)})


def _histogram(name: str, values: Sequence[float], unit: str, *, whole: bool = False) -> Distribution:
    chart = histogram_chart(histogram(values, whole=whole), title=f"{name}, {unit}", x_label=unit)
    if not chart:
        return Distribution(name, chart, absent="No sample was looked at.")
    facts = f"median {number(statistics.median(values))}, from {number(min(values))} to {number(max(values))}"
    return Distribution(name, chart, facts)


def _measured(name: str, values: Sequence[float], samples: Samples, unit: str) -> Distribution:
    total = sum(len(sample.cameras) for sample in samples.facts)
    if not values:
        absent = "Not measured: this data set's records have no such value." if total else "No sample was looked at."
        return Distribution(name, Markup(""), absent=absent)
    made = _histogram(name, values, unit)
    if len(values) == total:
        return made
    return Distribution(name, made.chart, f"{made.facts}; {grouped(total - len(values))} of {grouped(total)} without")


def _bars(name: str, counted: Mapping[str, int], noun: str) -> Distribution:
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    if not ranked:
        return Distribution(name, Markup(""), absent="Not counted.")
    shown = ranked[:MAX_BARS] if len(ranked) <= MAX_BARS else ranked[: MAX_BARS - 1]
    rest = ranked[len(shown) :]
    bars = [*shown, *([(f"{len(rest)} others", sum(count for _, count in rest))] if rest else [])]
    distinct = f"{len(ranked)} {noun}s" if len(ranked) > 1 else f"one {noun}"
    return Distribution(name, bar_chart(bars, title=name, is_small=True), f"cameras; {distinct}")
