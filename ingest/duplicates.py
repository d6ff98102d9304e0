"""Which clips are left out because another one is the same, or looks the same. Listed in the ledger, never silent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from infra.digests import sha256_json
from infra.media_fingerprint import BITS
from ingest.inspected import InspectedClip, failure_of
from ingest.schema import Failure


def drop_duplicates(
    ordered: Iterable[InspectedClip], *, near_bits: int | None = None
) -> tuple[list[InspectedClip], list[Failure]]:
    """(clips to build, ledger entries). The first of equal clips stays; `near_bits` also drops those that look alike.

    Unreadable clips are not compared: each says its own reason.
    """
    kept, failures, first_with = [], [], dict[str, str]()
    looks = None if near_bits is None else NearDuplicates(near_bits)
    for item in ordered:
        if item.failure is not None:
            failures.append(item.failure)
            continue
        if item.headers and all(item.headers):
            original = first_with.setdefault(_content(item), item.clip.source_id)
            if original != item.clip.source_id:
                failures.append(_refused(item, "duplicate", f"same content as {original}"))
                continue
            if looks is not None and item.fingerprint:
                near = looks.find_or_add(item.fingerprint, item.clip.source_id)
                if near is not None:
                    failures.append(_refused(item, "near_duplicate", f"{near[1]} of {BITS} bits from {near[0]}"))
                    continue
        kept.append(item)
    return kept, failures


class NearDuplicates:
    """Fingerprints seen so far; finds one within `max_bits` without comparing with all.

    Two fingerprints that differ in at most n bits agree in at least one of any n + 1 slices of them.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits
        edges = [BITS * number // (max_bits + 1) for number in range(max_bits + 2)]
        self._slices = list(pairwise(edges))
        self._by_slice: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._seen: list[tuple[int, str]] = []

    def find_or_add(self, fingerprint: str, name: str) -> tuple[str, int] | None:
        """(name, differing bits) of the earliest one that looks alike; None after adding this one."""
        value = int(fingerprint, 16)
        keys = [(number, (value >> low) & ((1 << (high - low)) - 1)) for number, (low, high) in enumerate(self._slices)]
        for index in sorted({index for key in keys for index in self._by_slice[key]}):
            other, earlier = self._seen[index]
            if (bits := (value ^ other).bit_count()) <= self.max_bits:
                return earlier, bits
        for key in keys:
            self._by_slice[key].append(len(self._seen))
        self._seen.append((value, name))
        return None


def _content(item: InspectedClip) -> str:
    videos = [[video.sha256, video.start_s, video.end_s] for video in item.clip.videos]
    # One scene under two sentences is two examples of what words mean.
    return sha256_json([videos, item.clip.start_s, item.clip.end_s, item.clip.text])


def _refused(item: InspectedClip, reason: str, message: str) -> Failure:
    return failure_of(item.clip, stage="plan", reason=reason, message=message)
