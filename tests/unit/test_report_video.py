"""The page of a video model: arms, what the sentence is worth, previews, and nothing a sentence says is obeyed."""

import json

from evaluation.report import TrainingRun, render
from evaluation.report.inputs import VIDEO_SECTIONS, ReportInputs
from evaluation.report.run import build, save_inputs
from evaluation.report.video import text_use
from evaluation.result import EvaluationResult, Item, Score
from infra.digests import pretty_json
from tests.helpers_report import result, write_mp4, write_png

LABELS = ("reach", "push")
RIGHT = [0.10, 0.11, 0.12, 0.13, 0.10, 0.11, 0.12, 0.13]


def losses(*, add: float, labels: tuple[str, ...] = LABELS) -> tuple[Item, ...]:
    return tuple(
        Item(
            item_id=f"{label}/{number}",
            stratum=label,
            metrics={"validation_loss": loss + add + number / 1000},
            details={"text": f"{label} it"},
        )
        for label in labels
        for number, loss in enumerate(RIGHT)
    )


def autoencoder() -> tuple[Item, ...]:
    """An arm that has pictures but no loss."""
    return tuple(item.model_copy(update={"metrics": {"psnr": 27.0}}) for item in losses(add=0.0))


def video_result(*, sentence: str = "push the puck", artefacts: dict[str, str] | None = None) -> EvaluationResult:
    """Being told the wrong sentence costs clips of reach 0.05; clips of push do not notice."""
    arms = {
        "copy-first-frame": losses(add=0.5),
        f"text:{sentence}": losses(add=0.05, labels=("reach",)),
        "text:reach the goal": losses(add=0.0, labels=("push",)),
    }
    made = result("validation_loss", losses(add=0.0), arms, artefacts=artefacts)
    ceiling = {"autoencoder": {"psnr": Score(value=27.0, low=26.0, high=28.0, count=16)}}
    return made.model_copy(
        update={
            "suite": "video-prediction",
            "higher_is_better": False,
            "arms": made.arms | {"autoencoder": autoencoder()},
            "arm_scores": made.arm_scores | ceiling,
            "scores": made.scores | {"psnr": Score(value=22.0, low=21.0, high=23.0, count=16)},
        }
    )


def test_the_gain_of_the_right_sentence_is_positive_where_the_wrong_one_costs():
    rows = {row.label: row for row in text_use(video_result())}
    assert (rows["reach"].own, rows["reach"].sentence) == ("reach it", "push the puck")
    assert abs(rows["reach"].difference.value - 0.05) < 1e-9
    assert rows["reach"].difference.verdict == "better"
    assert rows["push"].difference.verdict == "no measurable difference"
    assert rows["reach"].difference.count == len(RIGHT)


def test_the_page_of_a_finished_run_has_arms_sentences_curves_and_the_newest_preview(tmp_path):
    for step in (1, 800):
        write_png(tmp_path / f"previews/step-{step:06d}.png", seed=step)
        write_mp4(tmp_path / f"previews/step-{step:06d}.mp4", seed=step)
    write_png(tmp_path / "reconstruction.png")
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 9)]
    lines[0]["validation_loss"], lines[-1]["validation_loss"] = 1.5, 0.25
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "result").mkdir()
    (tmp_path / "result/result.json").write_bytes(pretty_json(video_result().to_json()))
    inputs = ReportInputs(
        title="Video model",
        sections=VIDEO_SECTIONS,
        runs=(TrainingRun(name="fine-tuning", metrics="metrics.jsonl"),),
        video_result="result",
        reconstruction="reconstruction.png",
        preview_folder="previews",
    )
    save_inputs(inputs, str(tmp_path))
    html = build("video", str(tmp_path)).read_text()
    for words in (
        "copy first frame",
        "push the puck",
        "+0.050",
        "in 1 of 2 pairs",
        "step-000800",
        "fine-tuning",
        "The autoencoder alone",
    ):
        assert words in html, words
    assert "step-000001" not in html
    assert "27.000" in html and "autoencoder has no validation loss" in html
    assert "text:" not in html and "text push" not in html  # wrong sentences are no arms of the main table
    assert "There is no policy result" not in html
    assert "validation</span>" in html  # the held-out loss is drawn into the loss's chart


def test_a_result_alone_and_previews_alone_make_a_page(tmp_path):
    (tmp_path / "result.json").write_bytes(pretty_json(video_result().to_json()))
    assert "Does the sentence matter?" in build("result", str(tmp_path)).read_text()
    write_png(tmp_path / "previews/step-000003.png")
    html = render(ReportInputs(title="t", sections=("video",), preview_folder=str(tmp_path / "previews")))
    assert "step-000003" in html
    assert "No evaluation of a video model was given." in html


def test_a_sentence_is_text_and_never_markup(tmp_path):
    hostile = "<script>alert(1)</script>\u202e"
    (tmp_path / "result.json").write_bytes(pretty_json(video_result(sentence=hostile).to_json()))
    html = render(ReportInputs(title="t", sections=("video",), video_result=str(tmp_path)))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html
