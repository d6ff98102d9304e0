"""What a data set's sentences, labels and splits come to."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from evaluation.report.distributions import counts
from evaluation.report.samples import Samples
from evaluation.report.text import cut, grouped, rate
from ingest.schema import Manifest

MAX_SENTENCES = 15
MAX_WORDS = 15
MAX_LABELS = 30
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# Words that say nothing of what is to be seen.
STOP_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "at",
        "but",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "off",
        "on",
        "onto",
        "or",
    }
    | {"out", "over", "so", "the", "to", "up", "with"}
)


@dataclass(frozen=True)
class Ranked:
    """One row: what, how often, and the bar beside it as a share of the largest."""

    what: str
    count: int
    share: float
    of_all: str


@dataclass(frozen=True)
class LabelRow:
    """One label: its samples, and how the samples that were looked at fall into the splits."""

    label: str
    row: Ranked
    splits: tuple[int, ...]


@dataclass(frozen=True)
class CaptionView:
    """Sentences of the samples that were looked at; labels and splits of all, where the manifest counts them."""

    num_samples: int
    num_distinct: int
    num_without: int
    share_without: str
    sentences: tuple[Ranked, ...]
    words: tuple[Ranked, ...]
    num_words: int
    labels: tuple[LabelRow, ...]
    num_labels: int
    splits: tuple[Ranked, ...]
    split_names: tuple[str, ...]  # columns of the label table: empty when not every sample was looked at


def caption_view(manifest: Manifest, samples: Samples) -> CaptionView:
    """Count words, sentences, labels and splits."""
    texts = [" ".join(sample.text.split()) for sample in samples.facts]
    sentences = Counter(text for text in texts if text)
    words = Counter(word for text in texts for word in WORD.findall(text.lower()) if word not in STOP_WORDS)
    without = sum(not text for text in texts)
    labels = counts(manifest, "label") or Counter(sample.label for sample in samples.facts)
    splits = counts(manifest, "split") or Counter(sample.split for sample in samples.facts)
    names = tuple(sorted(splits)) if samples.is_complete and len(splits) > 1 else ()
    joint = Counter((sample.label, sample.split) for sample in samples.facts)
    return CaptionView(
        num_samples=len(texts),
        num_distinct=len(sentences),
        num_without=without,
        share_without=rate(without / len(texts)) if texts else "–",
        sentences=ranked(sentences, MAX_SENTENCES),
        words=ranked(words, MAX_WORDS),
        num_words=len(words),
        labels=tuple(
            LabelRow(cut(label, limit=60) or "no label", row, tuple(joint[label, name] for name in names))
            for label, row in zip(_order(labels), ranked(labels, MAX_LABELS), strict=False)
        ),
        num_labels=len(labels),
        splits=ranked(splits, MAX_LABELS),
        split_names=names,
    )


def ranked(counted: Counter[str], limit: int) -> tuple[Ranked, ...]:
    """The most frequent ones, ties in alphabetical order."""
    total, order = sum(counted.values()) or 1, _order(counted)
    largest = counted[order[0]] if order else 1
    return tuple(
        Ranked(cut(what), counted[what], counted[what] / (largest or 1), rate(counted[what] / total))
        for what in order[:limit]
    )


def headline(view: CaptionView) -> str:
    """One sentence about the sentences."""
    if not view.num_distinct:
        return f"None of {grouped(view.num_samples)} samples has a caption."
    different = "one caption" if view.num_distinct == 1 else f"{grouped(view.num_distinct)} different captions"
    without = f"{grouped(view.num_without)} ({view.share_without}) have none" if view.num_without else "all have one"
    return (
        f"{grouped(view.num_samples)} samples have {different}; {without}. "
        f"{grouped(view.num_words)} different words, the commonest function words apart."
    )


def _order(counted: Counter[str]) -> list[str]:
    return sorted(counted, key=lambda what: (-counted[what], what))
