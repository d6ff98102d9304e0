"""What the page asks for, as plain values for JSON. Every foreign string is spelled out by `visible` on its way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from evaluation.report.ledger import REASON_WORDS
from evaluation.report.text import duration, show, size, visible
from evaluation.view.series import series_of
from evaluation.view.table import Filter, Row, Table
from infra.errors import InputError
from ingest.reader import ShardDataset
from ingest.schema import CameraRecord, Failure

MAX_PAGE = 500
MAX_CHOICES = 500
MAX_FACTS = 200
MAX_FACT_CHARACTERS = 2000


class NotFoundError(InputError):
    """There is no such page, clip, camera or frame."""


class NotReadYetError(InputError):
    """The clip may exist, but its record was not read yet."""


class Api:
    """Answers about one data set. `lock` guards `data`: its open files belong to one thread at a time."""

    def __init__(self, url: str) -> None:
        self.data = ShardDataset(url)
        self.lock = threading.Lock()
        self.table = Table(url)
        self.failures = [failure for receipt in self.data.manifest.receipts for failure in receipt.failures]

    def dataset(self) -> dict[str, Any]:
        """Name, counts, how far reading has come, and the choices of every filter."""
        manifest, table = self.data.manifest, self.table
        choices = {name: _choices(counted) for name, counted in table.counted().items()}
        reasons = Counter(failure.reason for failure in self.failures).most_common()
        return {
            "name": visible(manifest.name),
            "url": visible(self.data.url),
            "version": self.data.version,
            "layout": manifest.layout,
            "num_samples": manifest.num_samples,
            "num_frames": manifest.num_frames,
            "num_failures": len(self.failures),
            "size": size(sum(receipt.tar_bytes for receipt in manifest.receipts)),
            "num_read": table.num_read,
            "num_problems": table.num_problems,
            "problems": [visible(text) for text in table.problems],
            "choices": choices,
            "reasons": [
                {"value": name, "shown": name, "count": count, "words": REASON_WORDS[name]} for name, count in reasons
            ],
        }

    def samples(self, query: Mapping[str, str]) -> dict[str, Any]:
        """One page of the filtered list; `around` asks for the place of one clip in it as well."""
        wanted = Filter(
            corpus=query.get("corpus", ""),
            label=query.get("label", ""),
            split=query.get("split", ""),
            text=query.get("text", ""),
            unverified=query.get("unverified", "") == "1",
        )
        chosen = self.table.select(wanted)
        first, end = _page(query, len(chosen))
        answer = {
            "total": len(chosen),
            "offset": first,
            "rows": [_row(self.table.rows[position]) for position in chosen[first:end]],
        }
        if around := query.get("around", ""):
            row = self.table.find(around)
            numbers = (place for place, position in enumerate(chosen) if self.table.rows[position] is row)
            answer["position"] = next(numbers, None)
        return answer

    def sample(self, name: str) -> dict[str, Any]:
        """Everything known of one clip but its pixels and arrays; `name` is a key or a source id."""
        row = self.find(name)
        with self.lock:
            record, text = self.data.record(row.number), self.data.text(row.number)
        span = "whole source" if record.start_s is None else f"{show(record.start_s)} s to {show(record.end_s)} s"
        return _row(row) | {
            "text": visible(text),
            "layout": record.layout,
            "span": span,
            "cameras": [_camera(camera_name, camera) for camera_name, camera in record.cameras.items()],
            "metadata": _facts(record.metadata),
        }

    def arrays(self, name: str) -> list[dict[str, Any]]:
        """The clip's arrays as series."""
        row = self.find(name)
        with self.lock:
            arrays = self.data.arrays(row.number)
        return series_of(arrays, row.num_frames)

    def ledger(self, query: Mapping[str, str]) -> dict[str, Any]:
        """One page of refused clips, of one reason or with some words only."""
        reason, words = query.get("reason", ""), query.get("text", "").casefold().split()
        chosen = [failure for failure in self.failures if _admits(failure, reason, words)]
        first, end = _page(query, len(chosen))
        rows = [{name: visible(str(value)) for name, value in row.to_json().items()} for row in chosen[first:end]]
        return {"total": len(chosen), "offset": first, "rows": rows}

    def find(self, name: str) -> Row:
        """The row of a key or source id."""
        row = self.table.find(name)
        if row is not None:
            return row
        if not self.table.is_complete:
            read, total = self.table.num_read, self.table.num_samples
            raise NotReadYetError(f"{name!r} is not among the {read} of {total} clips read so far.")
        raise NotFoundError(f"No clip of this data set has the key or source id {name!r}.")


def _page(query: Mapping[str, str], total: int) -> tuple[int, int]:
    numbers = []
    for name, default in (("offset", 0), ("limit", 100)):
        text = query.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InputError(f"{name}={text!r} is not a number.", remedy="Use 0 or more.")
        numbers.append(int(text))
    first = min(numbers[0], total)
    return first, min(first + min(numbers[1], MAX_PAGE), total)


def _admits(failure: Failure, reason: str, words: Sequence[str]) -> bool:
    text = f"{failure.key} {failure.source_id} {failure.path} {failure.message}".casefold()
    return (not reason or failure.reason == reason) and all(word in text for word in words)


def _choices(counted: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"value": name, "shown": visible(name), "count": count} for name, count in counted[:MAX_CHOICES]]


def _row(row: Row) -> dict[str, Any]:
    fps = row.fps if isfinite(row.fps) and row.fps > 0 else 0.0
    return {
        "key": row.key,
        "source_id": visible(row.source_id),
        "corpus": visible(row.corpus),
        "label": visible(row.label),
        "text": visible(row.text),
        "split": visible(row.split),
        "fps": fps,
        "num_frames": row.num_frames,
        "duration": duration(row.num_frames / fps) if fps else "",
        "cameras": [visible(name) for name in row.cameras],
        "unverified": row.unverified,
    }


def _camera(name: str, camera: CameraRecord) -> dict[str, Any]:
    facts = {"motion": camera.motion, "brightness": camera.brightness, "source": camera.source.path}
    return {
        "name": visible(name),
        "width": camera.width,
        "height": camera.height,
        "num_frames": camera.num_frames,
        "length": camera.length,
        "facts": _facts({key: value for key, value in facts.items() if value is not None}),
    }


def _facts(value: Any) -> list[tuple[str, str]]:
    """Nested metadata as lines of name and text, bounded."""
    lines: list[tuple[str, str]] = []
    waiting = [("", value)]
    while waiting and len(lines) < MAX_FACTS:
        name, inner = waiting.pop()
        if isinstance(inner, dict) and inner:
            waiting.extend((f"{name}.{key}" if name else str(key), item) for key, item in reversed(inner.items()))
            continue
        text = ", ".join(map(show, inner)) if isinstance(inner, list) else show(inner)
        lines.append((visible(name[:MAX_FACT_CHARACTERS]), visible(text[:MAX_FACT_CHARACTERS])))
    return lines
