"""Which clips are held out for validation: a share or a count of each data set, or what the source itself says."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from fractions import Fraction
from math import floor
from typing import Literal

from infra.errors import ConfigError
from ingest.recipe import Recipe
from ingest.schema import Clip

Split = Literal["train", "validation"]
HELD_OUT_NAMES = frozenset({"val", "valid", "validate", "validation", "test"})
# Video Prediction Policy, section 4: trajectories held out of Bridge and Something-Something v2, and 3 % elsewhere.
PAPER_COUNTS = {"bridge": 5558, "sthv2": 2048, "something_something_v2": 2048}
PAPER_SHARE = 0.03


def data_set_of(clip: Clip, corpus: str) -> str:
    """The data set a clip belongs to: a corpus may hold several."""
    return str(clip.metadata.get("dataset") or corpus)


def draw_splits(clips: list[Clip], recipe: Recipe, corpus: str) -> dict[str, Split]:
    """The split of every clip, by its source id. Raises `ConfigError` where more is held out than there is."""
    if recipe.split_by == "source":
        return {
            clip.source_id: "validation" if clip.metadata.get("source_split") in HELD_OUT_NAMES else "train"
            for clip in clips
        }
    is_paper = recipe.split_by == "paper"
    counts = PAPER_COUNTS if is_paper else recipe.validation_counts
    share = Fraction(PAPER_SHARE if is_paper else recipe.validation_share)
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[data_set_of(clip, corpus) if counts else ""].append(clip)
    if unknown := sorted(set(recipe.validation_counts) - set(groups)):
        raise ConfigError(
            f"recipe.validation_counts names {unknown[0]!r}.", remedy=f"Data sets here: {', '.join(sorted(groups))}."
        )
    splits: dict[str, Split] = {}
    for name, members in groups.items():
        splits |= _systematic(members, _share(name, len(members), counts.get(name), share), recipe.seed)
    return splits


def draw(seed: int, purpose: str, name: str) -> float:
    """Uniform in [0, 1) from a hash: the same on every machine and in every order."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _share(name: str, number: int, count: int | None, otherwise: Fraction) -> Fraction:
    if count is None:
        return otherwise
    if count >= number:
        raise ConfigError(
            f"{count} clips of {name!r} shall be held out, it has {number}.",
            remedy="For a part of a data set, set recipe.split_by=draw and a recipe.validation_share.",
        )
    return Fraction(count, number)


def _systematic(clips: list[Clip], share: Fraction, seed: int) -> dict[str, Split]:
    """Systematic sampling of whole sources in seeded order within each label: every label gives its share."""
    units: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        units[_unit(clip)].append(clip)
    ordered = sorted(units, key=lambda name: (units[name][0].label, draw(seed, "split", name)))
    offset = Fraction(draw(seed, "offset", ""))
    held_out = {
        name
        for number, name in enumerate(ordered)
        if floor((number + 1) * share + offset) > floor(number * share + offset)
    }
    return {clip.source_id: "validation" if _unit(clip) in held_out else "train" for clip in clips}


def _unit(clip: Clip) -> str:
    """What is held out together: the segments of one recording. Episodes that only share a file are on their own."""
    if clip.videos and (clip.start_s is not None or clip.end_s is not None):
        return clip.videos[0].path
    return clip.source_id
