"""How far an ingest is: lines for the log, and the counters that flows, trackers and Ray carry under equal names.

Nothing here reads a clock or a disk by itself; a job feeds it the receipts as shards commit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ingest.schema import DECISIONS, Receipt

LINE_EVERY_S = 5.0


def counters_of(receipts: Iterable[Receipt]) -> dict[str, float]:
    """Totals under flat names: `ingest/clips`, `ingest/frames`, ..., `ingest/failures/REASON`. They only ever grow."""
    totals, reasons = Counter[str](), Counter[str]()
    for receipt in receipts:
        totals["shards"] += 1
        totals["clips"] += receipt.num_samples
        totals["frames"] += receipt.num_frames
        totals["tar_bytes"] += receipt.tar_bytes
        totals["source_ms"] += int(receipt.statistics.get("milliseconds", 0))
        reasons.update(failure.reason for failure in receipt.failures)
    set_aside = sum(count for reason, count in reasons.items() if reason in DECISIONS)
    return {
        **{f"ingest/{name}": float(totals[name]) for name in ("shards", "clips", "frames", "tar_bytes")},
        "ingest/source_seconds": totals["source_ms"] / 1000,
        # No metric may be called like the folder of others, so the sums are not `ingest/failures`.
        "ingest/refused": float(sum(reasons.values()) - set_aside),
        "ingest/set_aside": float(set_aside),
        **{f"ingest/failures/{reason}": float(count) for reason, count in sorted(reasons.items())},
    }


class Progress:
    """The state of one run, fed with receipts. `estimated_bytes`: what the plan expects of every shard's tar.

    Shards that an earlier run committed count as done but say nothing of this run's speed.
    """

    def __init__(
        self,
        estimated_bytes: Mapping[int, int],
        *,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = LINE_EVERY_S,
    ) -> None:
        # A shard of unreadable headers has no estimate, but it takes some time too.
        self._weights = {shard: max(size, 1) for shard, size in estimated_bytes.items()}
        self._clock, self._every_s = clock, every_s
        self._started = clock()
        self._last_line = self._started
        self._all: dict[int, Receipt] = {}
        self._mine: dict[int, Receipt] = {}

    def add(self, receipt: Receipt, *, resumed: bool = False) -> str | None:
        """Count a committed shard; the line to log, or None when the last one is too young or this is the final shard.

        The final line comes from `finish`.
        """
        self._all[receipt.shard] = receipt
        if not resumed:
            self._mine[receipt.shard] = receipt
        now = self._clock()
        if resumed or len(self._all) >= len(self._weights) or now - self._last_line < self._every_s:
            return None
        self._last_line = now
        return self.line()

    def finish(self) -> str:
        """The last line, whenever the one before it was."""
        self._last_line = self._clock()
        return self.line()

    def line(self) -> str:
        """Shards, clips, frames, rates, expected time left, and what was refused, in one line."""
        done, rates = self.counters(), self.rates()
        parts = [f"{len(self._all)} of {len(self._weights)} shards"]
        for name, unit in (("clips", "clips"), ("frames", "frames")):
            speed = rates.get(f"ingest/{name}_per_s")
            parts.append(f"{done[f'ingest/{name}']:,.0f} {unit}" + (f" ({speed:,.1f}/s)" if speed is not None else ""))
        if "ingest/times_real_time" in rates:
            parts.append(f"{rates['ingest/times_real_time']:.1f}x real time")
        if len(self._all) < len(self._weights):
            left = rates.get("ingest/eta_s")
            parts.append(f"ETA {_duration(left)}" if left is not None else "ETA unknown before this run's first shard")
        else:
            parts.append(f"took {_duration(rates['ingest/elapsed_s'])}")
        return ", ".join(parts) + self._refusals()

    def counters(self) -> dict[str, float]:
        """`counters_of` everything committed so far, and of how many shards there are."""
        return {**counters_of(self._all.values()), "ingest/shards_planned": float(len(self._weights))}

    def rates(self) -> dict[str, float]:
        """What goes up and down: speeds of this run, seconds gone and expected. Unknown ones are absent."""
        elapsed = self._clock() - self._started
        rates = {"ingest/elapsed_s": elapsed}
        mine = counters_of(self._mine.values())
        if elapsed <= 0 or not self._mine:
            return rates
        rates["ingest/clips_per_s"] = mine["ingest/clips"] / elapsed
        rates["ingest/frames_per_s"] = mine["ingest/frames"] / elapsed
        if mine["ingest/source_seconds"]:
            rates["ingest/times_real_time"] = mine["ingest/source_seconds"] / elapsed
        # Shards differ in size and the largest are built first: bytes say how much is left, their number does not.
        built = sum(self._weights.get(shard, 1) for shard in self._mine)
        left = sum(weight for shard, weight in self._weights.items() if shard not in self._all)
        rates["ingest/eta_s"] = elapsed * left / built
        return rates

    def _refusals(self) -> str:
        reasons = Counter(failure.reason for receipt in self._all.values() for failure in receipt.failures)
        text = ""
        for words, chosen in (
            ("refused", {reason: count for reason, count in reasons.items() if reason not in DECISIONS}),
            ("set aside", {reason: count for reason, count in reasons.items() if reason in DECISIONS}),
        ):
            if chosen:
                named = ", ".join(f"{reason} {count:,}" for reason, count in sorted(chosen.items(), key=_by_count))
                text += f"; {words} {sum(chosen.values()):,} ({named})"
        return text


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
