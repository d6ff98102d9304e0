"""`metrics.jsonl` of a training run as charts and a first-to-last table."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from markupsafe import Markup

from evaluation.report.charts import Series, line_chart, smooth
from evaluation.report.text import decimal, grouped
from infra import storage

Curve = list[tuple[float, float]]
STEP_KEYS = ("step", "epoch", "time", "wall_s", "seed", "rank", "position", "timestamp")
VALIDATION_PREFIXES = ("validation/", "validation_", "val/", "val_")
TRAIN_PREFIXES = ("train/", "train_")
LOSS_WORDS = ("loss", "kl", "mse", "nll")
END_WINDOW = 50  # logged values averaged at the end: single steps are noisy
SMOOTH_FROM = 60  # logged values from which a moving average is drawn over the raw trace


@dataclass(frozen=True)
class Panel:
    """One chart of one metric."""

    name: str
    chart: Markup
    has_validation: bool
    smoothed: bool


@dataclass(frozen=True)
class Change:
    """A loss at the start and the end of a run."""

    name: str
    first: str
    last: str
    ratio: str


@dataclass(frozen=True)
class RunView:
    """What the page shows of one training run."""

    name: str
    losses: tuple[Panel, ...]
    others: tuple[Panel, ...]
    changes: tuple[Change, ...]
    caption: str
    notes: tuple[str, ...]


def parse_metrics(text: str) -> tuple[dict[str, Curve], list[str]]:
    """Curves by metric name, sorted by step, and notes on what could not be drawn.

    A resumed run may log a step twice: the later line is the one that counts.
    """
    by_step: dict[float, dict[str, float]] = {}
    malformed, hidden = 0, 0
    for line in text.splitlines():
        if not line.strip():
            continue
        record = _parse_line(line)
        if record is None:
            malformed += 1
            continue
        finite = {key: value for key, value in record.items() if math.isfinite(value)}
        hidden += len(record) - len(finite)
        by_step.setdefault(finite.get("step", float(len(by_step))), {}).update(finite)
    notes = []
    if malformed:
        notes.append(f"{malformed} malformed lines of the metrics file were skipped.")
    if hidden:
        notes.append(f"{hidden} values that are not finite are not drawn.")
    curves: dict[str, Curve] = {}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            if key not in STEP_KEYS:
                curves.setdefault(key, []).append((step, value))
    return curves, notes


def run_view(name: str, url: str) -> RunView:
    """Read a metrics file; raises `InputError` or `StorageError` as storage does."""
    curves, notes = parse_metrics(storage.read_bytes(url).decode("utf-8", errors="replace"))
    panels: dict[str, dict[str, Curve]] = {}
    for key, curve in curves.items():
        base, split = _split_of(key)
        panels.setdefault(base, {})[split] = curve
    losses = sorted((base for base in panels if _is_loss(base)), key=lambda base: (base != "loss", base))
    others = sorted(base for base in panels if not _is_loss(base) and _varies(panels[base]))
    changes = tuple(_change(base, panels[base]["train"]) for base in losses if len(panels[base].get("train", ())) > 1)
    steps = max((curve[-1][0] for curve in curves.values()), default=0.0)
    return RunView(
        name=name,
        losses=tuple(_panel(base, panels[base]) for base in losses),
        others=tuple(_panel(base, panels[base]) for base in others),
        changes=changes,
        caption=f"{grouped(int(steps))} training steps." if curves else "The metrics file holds no value.",
        notes=tuple(notes),
    )


def _parse_line(line: str) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return {key: _as_float(value) for key, value in record.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _split_of(key: str) -> tuple[str, str]:
    for prefix in VALIDATION_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix), "validation"
    for prefix in TRAIN_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix), "train"
    return key, "train"


def _is_loss(name: str) -> bool:
    return any(word in name.lower().replace("/", "_").split("_") for word in LOSS_WORDS)


def _varies(splits: dict[str, Curve]) -> bool:
    return any(len({value for _, value in curve}) > 1 for curve in splits.values())


def _panel(name: str, splits: dict[str, Curve]) -> Panel:
    train, validation = splits.get("train", []), splits.get("validation", [])
    smoothed = len(train) >= SMOOTH_FROM
    series = [Series("train", train, faint=smoothed)] if train else []
    if smoothed:
        series.append(Series("train, moving average", smooth(train, half_width=max(2, len(train) // 40))))
    if validation:
        series.append(Series("validation", validation, style=1))
    return Panel(name, line_chart(series, title=f"{name} over training steps"), bool(validation), smoothed)


def _change(name: str, curve: Curve) -> Change:
    first = curve[0][1]
    tail = [value for _, value in curve[-min(END_WINDOW, max(1, len(curve) // 4)) :]]
    last = sum(tail) / len(tail)
    ratio = f"{last / first:.2f}" if first > 0 else "–"
    return Change(name, _fixed(first), _fixed(last), ratio)


def _fixed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if abs(value) >= 0.01 else decimal(value)
