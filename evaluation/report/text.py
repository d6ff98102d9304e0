"""Numbers and foreign strings as the page shows them."""

from __future__ import annotations

import math
import unicodedata

# Reordering and zero-width marks make a file name read as another one; they are shown, not obeyed.
INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
KEPT = frozenset("\n\t")


def visible(text: str) -> str:
    """The string with control, formatting and lone surrogate characters spelled out as `\\x1b` or `\\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spell(character) for character in text)


def _spell(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in INVISIBLE_CATEGORIES:
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def show(value: object) -> str:
    """A plain value as text: floats to four significant digits, booleans as yes and no."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, int):
        return grouped(value)
    return str(value)


def decimal(value: float) -> str:
    """Four significant digits with a real minus sign."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}".replace("-", "−")


def signed(value: float, *, digits: int = 3) -> str:
    """`+0.012` or `−0.012`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def grouped(value: int) -> str:
    """Thousands apart by a narrow space that does not break: `12 093`."""
    return f"{value:,}".replace(",", "\u202f").replace("-", "−")


def duration(seconds: float | None) -> str:
    """`12.3 s`, `4 min 07 s`, `1 h 02 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(num_bytes: float) -> str:
    """`3.2 MB` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def rate(value: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * value:.1f} %".replace("-", "−")


def span(low: float, high: float) -> str:
    """An interval of shares: `90.6–98.2 %`."""
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def cut(text: str, *, limit: int = 160) -> str:
    """The text in one line, and not longer than `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1] + "…"
