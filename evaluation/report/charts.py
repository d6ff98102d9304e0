"""Small charts as inline SVG: lines, dots with intervals, histograms, counted bars. Colours come from the page."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluation.report.text import visible

WIDTH = 320.0
HEIGHT = 200.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 10.0, 8.0, 38.0
MAX_POINTS = 300
MAX_LABELS = 8  # below a histogram
NUM_BINS = 14
TAIL = 3.0  # times the spread of all but the last two per cent
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` 0-3 picks the colour; `faint` draws it as a background trace."""

    label: str
    points: Points
    style: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""
    strong: bool = False


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers covering [low, high] (steps of 1, 2 or 5 times a power of ten)."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: three significant digits, without trailing zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def smooth(points: Points, *, half_width: int) -> list[tuple[float, float]]:
    """Centred moving average whose window shrinks at the ends, so nothing is shifted."""
    values = [value for _, value in points]
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    smoothed = []
    for index, (step, _) in enumerate(points):
        reach = min(half_width, index, len(points) - 1 - index)
        smoothed.append((step, (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)))
    return smoothed


def thin(points: Points) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points: bucket means, first and last point kept."""
    if len(points) <= MAX_POINTS:
        return list(points)
    inner = points[1:-1]
    size = math.ceil(len(inner) / (MAX_POINTS - 2))
    buckets = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in buckets]
    return [points[0], *means, points[-1]]


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "training step") -> Markup:
    """Lines over a common x axis; empty markup when there is no point."""
    points = [point for line in series for point in line.points]
    if not points:
        return Markup("")
    xs = [x for x, _ in points]
    y_ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    x_high = max(xs)
    x_low = 0.0 if 0 <= min(xs) < 0.1 * x_high else min(xs)
    x_high = max(x_high, x_low + 1e-9)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high] or [x_low]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_open(WIDTH, HEIGHT, title)]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(_grid(LEFT, y, WIDTH - RIGHT, y))
        parts.append(_label(LEFT - 7, y + 4, number(tick), anchor="end"))
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(_label(x, HEIGHT - BOTTOM + 17, number(tick), anchor="middle"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, anchor="middle"))
    parts.extend(_path(line, [place(x, y) for x, y in thin(line.points)]) for line in series)
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def interval_chart(
    rows: Sequence[Interval], *, title: str, bounds: tuple[float, float] | None = None, percent: bool = False
) -> Markup:
    """Dots with whiskers, one row each; `bounds` fixes the axis, `percent` labels it in per cent."""
    if not rows:
        return Markup("")
    low, high = bounds or (min(row.low for row in rows), max(row.high for row in rows))
    ticks = nice_ticks(low, high, count=6)
    width, row_height, left, right, bottom = 720.0, 28.0, 216.0, 90.0, 26.0
    height = row_height * len(rows) + bottom

    def place(value: float) -> float:
        share = (min(max(value, ticks[0]), ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0])
        return left + share * (width - left - right)

    parts = [_open(width, height, title)]
    for tick in ticks:
        x = place(tick)
        text = f"{100 * tick:.0f} %" if percent else number(tick)
        kind = "zero" if tick == 0 and ticks[0] < 0 else ""
        parts.append(_grid(x, 2, x, height - bottom + 4, kind=kind))
        parts.append(_label(x, height - 6, text, anchor="middle"))
    for index, row in enumerate(rows):
        y = row_height * (index + 0.5)
        style = "strong" if row.strong else "plain"
        parts.append(_label(left - 14, y + 4, _shorten(row.label), anchor="end", kind=f"row {style}"))
        parts.append(
            Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                style, place(row.low), place(row.high), y, y
            )
        )
        parts.append(
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(style, place(row.value), y)
        )
        parts.append(_label(width - right + 14, y + 4, row.note, anchor="start", kind=f"note {style}"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


@dataclass(frozen=True)
class Histogram:
    """Counts between ascending edges. `is_open`: the last bin holds everything beyond as well; `is_whole`: a bin is a
    whole number.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_open: bool = False
    is_whole: bool = False


def histogram(values: Sequence[float], *, whole: bool = False, num_bins: int = NUM_BINS) -> Histogram:
    """About `num_bins` bins with round edges (whole numbers with `whole`); a long thin tail goes into the last one."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return Histogram((), ())
    low, high = ordered[0], ordered[-1]
    # One clip of an hour among thousands of seconds would leave a single bar.
    typical = ordered[math.ceil(0.98 * len(ordered)) - 1]
    is_open = high - low > TAIL * (typical - low) > 0
    if high - low <= 1e-6 * max(abs(low), abs(high)) or high - low < 1e-12:
        is_open, half = False, abs(low) / 4 or 1.0
        low, high = low - half if low < 0 else max(low - half, 0.0), high + half
    edges = nice_ticks(low, typical if is_open else high, count=num_bins + 1)
    is_whole = whole and edges[1] - edges[0] <= 1
    if is_whole:
        edges = [float(edge) for edge in range(math.floor(low), math.floor(high) + 2)]
    if edges[-1] <= ordered[-1] and not is_open:
        edges.append(2 * edges[-1] - edges[-2])
    counts = [0] * (len(edges) - 1)
    for value in ordered:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return Histogram(tuple(edges), tuple(counts), is_open, is_whole)


def histogram_chart(data: Histogram, *, title: str, x_label: str) -> Markup:
    """Columns that touch; each says its bin and count to whoever points at it."""
    if not data.counts:
        return Markup("")
    y_ticks = [tick for tick in nice_ticks(0, max(data.counts), count=4) if tick == round(tick)]
    top = max(y_ticks[-1], *data.counts)
    step = (WIDTH - LEFT - RIGHT) / len(data.counts)
    floor = HEIGHT - BOTTOM
    parts = [_open(WIDTH, HEIGHT, title)]
    for tick in y_ticks:
        y = floor - tick / top * (floor - TOP)
        parts += [_grid(LEFT, y, WIDTH - RIGHT, y), _label(LEFT - 7, y + 4, number(tick), anchor="end")]
    for index, count in enumerate(data.counts):
        height = count / top * (floor - TOP)
        parts.append(
            Markup(
                '<rect class="count" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(LEFT + index * step + 0.5, floor - height, max(step - 1, 0.5), height, _bin_words(data, index))
        )
    every = math.ceil(len(data.edges) / MAX_LABELS)
    # A column that stands for one whole number is labelled below its middle.
    shift = step / 2 if data.is_whole else 0.0
    for index in range(0, len(data.edges) - data.is_whole, every):
        text = "more" if data.is_open and index == len(data.counts) else number(data.edges[index])
        parts.append(_label(LEFT + index * step + shift, floor + 17, text, anchor="middle"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, anchor="middle"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _bin_words(data: Histogram, index: int) -> str:
    low, high = number(data.edges[index]), number(data.edges[index + 1])
    if data.is_whole and not data.is_open:
        return f"{low}: {data.counts[index]}"
    span = f"{low} and more" if data.is_open and index == len(data.counts) - 1 else f"{low} to {high}"
    return f"{span}: {data.counts[index]}"


def bar_chart(bars: Sequence[tuple[str, int]], *, title: str, is_small: bool = False) -> Markup:
    """One row a bar: its label, a bar as long as its share of the largest, its count. `is_small`: to fit a panel."""
    if not bars:
        return Markup("")
    width, row_height, left, right = (WIDTH, 22.0, 84.0, 62.0) if is_small else (720.0, 24.0, 150.0, 90.0)
    largest = max(count for _, count in bars) or 1
    parts = [_open(width, row_height * len(bars), title)]
    for index, (label, count) in enumerate(bars):
        y, long = row_height * index, (width - left - right) * count / largest
        parts.append(_label(left - 14, y + 16, _shorten(label), anchor="end", kind="row plain"))
        parts.append(
            Markup('<rect class="count" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                left, y + 5, long, row_height - 10
            )
        )
        parts.append(_label(left + long + 10, y + 16, str(count), anchor="start", kind="note plain"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _open(width: float, height: float, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">').format(width, height, visible(title))


def _grid(x1: float, y1: float, x2: float, y2: float, *, kind: str = "") -> Markup:
    return Markup('<line class="grid {}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _label(x: float, y: float, text: str, *, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, visible(text)
    )


def _path(line: Series, placed: Points) -> Markup:
    faint = " faint" if line.faint else ""
    if len(placed) == 1:
        (x, y) = placed[0]
        return Markup('<circle class="mark s{}{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(line.style, faint, x, y)
    track = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    return Markup('<path class="line s{}{}" d="M{}"><title>{}</title></path>').format(
        line.style, faint, track, visible(line.label)
    )


def _shorten(label: str, *, limit: int = 32) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
