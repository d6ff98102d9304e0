"""The page of one data set, section by section: what is in it, how it looks, what was refused, how long it took."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evaluation.report.assets import AssetBox
from evaluation.report.captions import caption_view, headline
from evaluation.report.distributions import counts, distributions
from evaluation.report.inputs import DatasetInput, ReportInputs, SectionName
from evaluation.report.ledger import engine_words, failure_groups
from evaluation.report.samples import Samples, read_samples
from evaluation.report.sheets import contact_sheets
from evaluation.report.text import duration, grouped, rate, size
from evaluation.report.times import read_logs, times_view
from infra.errors import InputError
from ingest.reader import ShardDataset
from ingest.schema import DECISIONS, Failure, Manifest

Part = tuple[Any, tuple[str, ...]]  # what a section shows, None for nothing, and what is to be said about it

LENGTH_WORDS = {
    "declared": "as many frames as the container declares",
    "annotated": "as many frames as the corpus's annotation says",
    "unverified": "nothing says how many frames there should be",
}


@dataclass(frozen=True)
class Outcome:
    """Where the clips of the corpus went: one part of the bar at the top."""

    kind: str
    words: str
    count: int
    share: float
    percent: str


@dataclass(frozen=True)
class Overview:
    """The first section."""

    figures: tuple[tuple[str, str, str], ...]
    outcomes: tuple[Outcome, ...]
    facts: tuple[tuple[str, str], ...]
    version: str
    plan_id: str
    engine: str
    lengths: tuple[tuple[str, int, str], ...]
    lengths_of: str
    recipe: str


class DatasetPage:
    """The sections of one data set's page. Everything is read at most once, when a section first needs it."""

    def __init__(self, inputs: ReportInputs, box: AssetBox, *, thumbnails: Mapping[str, bytes]) -> None:
        self._inputs, self._box, self._thumbnails = inputs, box, thumbnails

    def builders(self) -> dict[SectionName, Callable[[], Part]]:
        """A function for each section that this class knows."""
        return {
            "overview": self._overview,
            "sheets": self._sheets,
            "distributions": self._distributions,
            "captions": self._captions,
            "failures": self._failures,
            "filtered": self._filtered,
            "times": self._times,
        }

    @property
    def _given(self) -> DatasetInput:
        if not self._inputs.datasets:
            raise InputError("No data set was given.")
        return self._inputs.datasets[0]

    @cached_property
    def _data(self) -> ShardDataset:
        return ShardDataset(self._inputs.at(self._given.url))

    @cached_property
    def _samples(self) -> Samples:
        return read_samples(self._data)

    def _overview(self) -> Part:
        manifest = self._data.manifest
        lengths, lengths_of = _lengths(manifest, self._samples)
        view = Overview(
            figures=_figures(manifest),
            outcomes=_outcomes(manifest),
            facts=_facts(manifest),
            version=self._data.version,
            plan_id=manifest.plan_id,
            engine=engine_words(manifest),
            lengths=lengths,
            lengths_of=lengths_of,
            recipe=json.dumps(manifest.recipe, indent=2, sort_keys=True, ensure_ascii=False),
        )
        return view, self._samples.notes

    def _sheets(self) -> Part:
        sheets, notes = contact_sheets(self._data, self._samples, self._box)
        return sheets or None, tuple(notes) if sheets or notes else ("The data set holds no sample.",)

    def _distributions(self) -> Part:
        return distributions(self._data.manifest, self._samples), ()

    def _captions(self) -> Part:
        view = caption_view(self._data.manifest, self._samples)
        return {"words": view, "headline": headline(view)}, ()

    def _failures(self) -> Part:
        failures = [failure for failure in _ledger(self._data.manifest) if failure.reason not in DECISIONS]
        if not failures:
            return None, ("Nothing was quarantined.",)
        return self._groups(failures), ()

    def _filtered(self) -> Part:
        decisions = [failure for failure in _ledger(self._data.manifest) if failure.reason in DECISIONS]
        if not decisions:
            return None, ("No sound source was set aside.",)
        return self._groups(decisions), ()

    def _groups(self, failures: list[Failure]) -> dict[str, Any]:
        source = self._inputs.at(self._given.source) if self._given.source else ""
        groups = failure_groups(failures, source, self._box, self._thumbnails)
        return {"groups": groups, "total": len(failures), "has_source": bool(source or self._thumbnails)}

    def _times(self) -> Part:
        logs, notes = read_logs(self._data.url, self._data.manifest)
        if not logs:
            return None, tuple(notes)
        return times_view(self._data, logs), tuple(notes)


def _ledger(manifest: Manifest) -> list[Failure]:
    return [failure for receipt in manifest.receipts for failure in receipt.failures]


def _tar_bytes(manifest: Manifest) -> int:
    return sum(receipt.tar_bytes for receipt in manifest.receipts)


def _seconds(manifest: Manifest) -> float | None:
    seconds = manifest.statistics.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _figures(manifest: Manifest) -> tuple[tuple[str, str, str], ...]:
    """(number, what it is, what it rests on) of the cards at the top."""
    seconds, samples = _seconds(manifest), manifest.num_samples
    refused = sum(failure.reason not in DECISIONS for failure in _ledger(manifest))
    figures = [(grouped(samples), "samples", f"{grouped(len(manifest.receipts))} shards")]
    if seconds is not None:
        mean = f"{duration(seconds / samples)} a clip" if samples else "no clip"
        figures.append((duration(seconds), "of video, first camera", mean))
    per_sample = f"{grouped(round(manifest.num_frames / samples))} a sample" if samples else "no sample"
    per_frame = f"{size(_tar_bytes(manifest) / manifest.num_frames)} a frame" if manifest.num_frames else "no frame"
    return (
        *figures,
        (grouped(manifest.num_frames), "frames, all cameras", per_sample),
        (size(_tar_bytes(manifest)), "on disk", per_frame),
        (grouped(refused), "refused", f"{grouped(manifest.num_failures - refused)} set aside by rule"),
    )


def _outcomes(manifest: Manifest) -> tuple[Outcome, ...]:
    aside = sum(failure.reason in DECISIONS for failure in _ledger(manifest))
    refused = manifest.num_failures - aside
    total = manifest.num_samples + aside + refused or 1
    parts = (
        ("kept", "became samples", manifest.num_samples),
        ("aside", "set aside by rule", aside),
        ("refused", "refused", refused),
    )
    return tuple(Outcome(kind, words, count, count / total, rate(count / total)) for kind, words, count in parts)


def _facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    return (
        ("name", manifest.name),
        ("corpus", manifest.corpus),
        ("layout", manifest.layout),
        ("source videos", grouped(len(manifest.inputs))),
        ("parent", manifest.parent[:12] or "none"),
    )


def _lengths(manifest: Manifest, samples: Samples) -> tuple[tuple[tuple[str, int, str], ...], str]:
    """How many cameras had their number of frames held against what, and of which cameras that is the count."""
    counted, of = counts(manifest, "length"), "of all cameras"
    if not counted:
        counted = Counter(camera.length for sample in samples.facts for camera in sample.cameras)
        of = "of all cameras" if samples.is_complete else "of the cameras that were looked at"
    return tuple((name, counted[name], words) for name, words in LENGTH_WORDS.items()), of
