"""A video model's evaluation as the page shows it: arms, what the sentence is worth, previews."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.report.assets import AssetBox
from evaluation.report.comparison import Difference, difference_from, metric_title
from evaluation.report.gallery import Gallery, gallery
from evaluation.report.text import signed
from evaluation.result import EvaluationResult
from infra import storage

WRONG_TEXT = "text:"  # arms that were told another sentence: "text:open the drawer"
NEXT_TEXT, NEXT = "text:next", "the next sentence of the alphabet"
PREVIEW_SUFFIXES = (".png", ".mp4")


@dataclass(frozen=True)
class TextUse:
    """Clips of one label told another sentence: what their own gains on equal clips and equal noise."""

    label: str
    own: str  # their own sentence, empty when they have several
    sentence: str
    difference: Difference


def without_wrong_texts(result: EvaluationResult) -> EvaluationResult:
    """The result without its wrong-sentence arms, which have a table of their own."""

    def keep(name: str) -> bool:
        return not name.startswith(WRONG_TEXT)

    arms = {name: items for name, items in result.arms.items() if keep(name)}
    scores = {name: values for name, values in result.arm_scores.items() if keep(name)}
    return result.model_copy(update={"arms": arms, "arm_scores": scores})


def text_use(result: EvaluationResult) -> tuple[TextUse, ...]:
    """One row for each label and each wrong sentence its clips were told, in the result's order."""
    rows = []
    for name, items in result.arms.items():
        if not name.startswith(WRONG_TEXT):
            continue
        for label in dict.fromkeys(item.stratum for item in items):
            chosen = [item for item in items if item.stratum == label]
            difference = difference_from(result, chosen, label=name)
            if difference is not None:
                own = {str(item.details.get("text", "")) for item in chosen}
                told = NEXT if name == NEXT_TEXT else name.removeprefix(WRONG_TEXT)
                rows.append(TextUse(label, own.pop() if len(own) == 1 else "", told, difference))
    return tuple(sorted(rows, key=lambda row: row.label))


def text_sentence(rows: tuple[TextUse, ...], metric: str) -> str:
    """What the table says in one line; empty without a row."""
    if not rows:
        return ""
    better = sum(row.difference.verdict == "better" for row in rows)
    worst = min(rows, key=lambda row: row.difference.value)
    return (
        f"The right sentence has a measurably better {metric_title(metric)} than a wrong one in {better} of "
        f"{len(rows)} pairs of label and sentence; the smallest gain is {signed(worst.difference.value, digits=4)}"
        f" ({worst.label}, told {worst.sentence!r})."
    )


def previews(folder: str, box: AssetBox) -> Gallery:
    """The newest preview that a training run left: one contact sheet, one clip; empty when it left none."""
    newest: dict[str, str] = {}
    for suffix in PREVIEW_SUFFIXES:
        names = storage.list_names(folder, suffix=suffix)
        if names:
            name = max(names)
            newest[name.removesuffix(suffix) + (" (moving)" if suffix == ".mp4" else "")] = name
    return gallery(folder, newest, box)
