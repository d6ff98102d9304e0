"""Does the sentence matter: every clip beside other sentences of the suite, at equal sigma and noise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.video_quality.clips import ChosenClip
from evaluation.video_quality.config import NEXT_TEXT
from infra.digests import sha256_bytes, short
from infra.errors import ConfigError

ARM_PREFIX = "text:"
WrongText = Literal["auto", "all", "next", "none"]
MAX_NAME = 60


@dataclass(frozen=True)
class WrongArm:
    """One arm: the sentence that each clip gets instead of its own; clips whose own it is are left out."""

    name: str  # of the arm: "text:SENTENCE", or "text:next"
    label: str  # the label that the sentence belongs to, where there is just one, else the sentence
    sentences: Mapping[str, str]  # own sentence -> wrong one


def wrong_arms(chosen: Sequence[ChosenClip], kind: WrongText, *, max_sentences: int) -> list[WrongArm]:
    """The arms of a suite; none when all clips share one sentence.

    Raises `ConfigError` when "all" would rate every clip with more than `max_sentences` sentences.
    """
    sentences = sorted({clip.text for clip in chosen})
    if kind == "none" or len(sentences) < 2:
        return []
    if kind == "auto":
        kind = "all" if len(sentences) <= max_sentences else "next"
    if kind == "next":
        following = dict(zip(sentences, [*sentences[1:], sentences[0]], strict=True))
        return [WrongArm(NEXT_TEXT, "next", following)]
    if len(sentences) > max_sentences:
        raise ConfigError(
            f"wrong_text 'all' would rate every clip with {len(sentences)} sentences, more than {max_sentences}.",
            remedy="Set wrong_text=next, choose fewer labels, or raise max_sentences.",
        )
    labels = _labels(chosen)
    return [
        WrongArm(f"{ARM_PREFIX}{wrong}", labels[wrong], {own: wrong for own in sentences if own != wrong})
        for wrong in sentences
    ]


def score_part(name: str) -> str:
    """A label or sentence as part of a score's name: only what metric trackers accept, and not too long."""
    plain = re.sub(r"[^\w.\- ]+", "_", name).strip() or "none"
    return plain if len(plain) <= MAX_NAME else f"{plain[:MAX_NAME]}-{short(sha256_bytes(name.encode()))}"


def _labels(chosen: Sequence[ChosenClip]) -> dict[str, str]:
    """Sentence -> its label where the two belong to each other alone, else the sentence itself."""
    of_sentence: dict[str, set[str]] = {}
    of_label: dict[str, set[str]] = {}
    for clip in chosen:
        of_sentence.setdefault(clip.text, set()).add(clip.stratum)
        of_label.setdefault(clip.stratum, set()).add(clip.text)
    found = {}
    for sentence, labels in of_sentence.items():
        only = min(labels)
        found[sentence] = only if len(labels) == 1 and len(of_label[only]) == 1 else sentence
    return found
