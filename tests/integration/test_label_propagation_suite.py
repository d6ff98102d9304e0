"""The label propagation suite on a small DAVIS folder: pairing, pooled scores, pictures, reruns, refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import main as evaluation_main
from evaluation.gate import decide, encoder_rule
from evaluation.label_propagation import davis_scores, suite
from evaluation.label_propagation.config import LabelPropagationConfig, davis_dino, davis_rsp
from evaluation.label_propagation.layouts import read_davis, write_davis_sequence, write_davis_split
from evaluation.label_propagation.predict import prepare, resize_bilinear, working_size
from evaluation.label_propagation.propagate import PropagationConfig
from evaluation.result import EvaluationResult
from infra.errors import InputError
from infra.storage import list_names, read_json
from tests.helpers_models import export_rsp, perturbed

NUM_FRAMES = 6
OBJECTS = {"one-mover": 1, "two-movers": 2}


def moving_squares(num_objects: int, *, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Coloured textured squares of 16 px that move 8 px, one patch, a frame over a textured ground, with noise."""
    random = np.random.default_rng(num_objects)
    ground = random.integers(60, 120, (size, size, 3), dtype=np.uint8)
    frames, labels = np.repeat(ground[None], NUM_FRAMES, axis=0), np.zeros((NUM_FRAMES, size, size), np.uint8)
    for number in range(1, num_objects + 1):
        texture = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        texture[..., number % 3] += 40
        for frame in range(NUM_FRAMES):
            place = frame, slice(16 * number, 16 * number + 16), slice(8 * frame, 8 * frame + 16)
            frames[place], labels[place] = texture, number
    noisy = frames + random.normal(0, 25, frames.shape)
    return noisy.round().clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("davis")
    for name, num_objects in OBJECTS.items():
        frames, labels = moving_squares(num_objects)
        write_davis_sequence(root, name, frames_THW3=frames, labels_THW=labels)
    write_davis_split(root, tuple(OBJECTS))
    return str(root)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("export")
    export_rsp(folder, perturbed())
    return str(folder)


def config_for(encoder: str, data: str, output: Path | str, **changes: object) -> LabelPropagationConfig:
    settings = {
        "propagation": PropagationConfig(top_k=3, radius=2, queue=3),
        "short_side": 64,
        "multiple": 8,
        "num_overlays": 1,
        "workers": 1,
        "matmul": "default",
    }
    return LabelPropagationConfig(encoder=encoder, data=data, output=str(output), **(settings | changes))


@pytest.fixture(scope="module")
def finished(encoder: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationResult]:
    output = tmp_path_factory.mktemp("result")
    return output, suite.run(config_for(encoder, data, output))


def test_every_arm_is_scored_on_the_same_sequences(finished: tuple[Path, EvaluationResult], data: str):
    result = finished[1]
    assert list(result.arms) == ["random-initialisation", "raw-patches", "copy-first-mask"]
    for items in (result.items, *result.arms.values()):
        assert [item.item_id for item in items] == list(OBJECTS)
        assert [len(item.details["objects"]) for item in items] == list(OBJECTS.values())
    folder = read_davis(data)
    for item in result.arms["copy-first-mask"]:
        labels = folder.labels(item.item_id)
        expected = davis_scores(labels, np.repeat(labels[:1], NUM_FRAMES, axis=0)).statistics
        assert item.metrics["J"] == pytest.approx(expected["J-Mean"].mean())
        assert item.metrics["J&F"] == pytest.approx((expected["J-Mean"] + expected["F-Mean"]).mean() / 2)
    assert {item.item_id: item.metrics for item in result.items} != {
        item.item_id: item.metrics for item in result.arms["random-initialisation"]
    }


def test_matching_patches_follow_an_object_that_a_copied_mask_loses(finished: tuple[Path, EvaluationResult]):
    model, arms = finished[1].scores, finished[1].arm_scores
    copied = arms["copy-first-mask"]["J"].value
    assert copied < 0.2
    assert model["J"].value > 0.8
    assert arms["random-initialisation"]["J"].value > 0.7
    assert arms["raw-patches"]["J"].value > copied + 0.1


def test_pooled_scores_are_means_over_objects_not_over_sequences(finished: tuple[Path, EvaluationResult]):
    result = finished[1]
    objects = [row["J&F-Mean"] for item in result.items for row in item.details["objects"]]
    assert len(objects) == 3
    score = result.scores["J&F"]
    assert score.value == pytest.approx(np.mean(objects))
    assert (score.count, score.low <= score.value <= score.high) == (2, True)
    assert result.primary_metric == "J&F"


def test_the_result_is_the_last_file_and_pictures_show_every_arm(finished: tuple[Path, EvaluationResult]):
    output, result = finished
    assert EvaluationResult.parse(read_json(output / "result.json")) == result
    assert list(result.artefacts) == [f"one-mover at {percent} % of the sequence" for percent in (25, 50, 100)]
    for path in result.artefacts.values():
        assert (output / path).stat().st_mtime_ns <= (output / "result.json").stat().st_mtime_ns
        with Image.open(io.BytesIO((output / path).read_bytes())) as picture:
            assert picture.format == "PNG"
            assert picture.size == (5 * 192 + 4 * 4, 212)
            truth = np.asarray(picture.convert("RGB"))[20:, :192].astype(int)
        assert (truth[..., 2] - truth[..., 0] > 60).sum() > 400, "the first object is marked in blue"


def test_a_finished_output_is_read_not_redone(
    finished: tuple[Path, EvaluationResult], encoder: str, data: str, monkeypatch: pytest.MonkeyPatch
):
    output, result = finished
    monkeypatch.setattr(suite, "_run_all", None)
    assert suite.run(config_for(encoder, data, output, workers=2)) == result


def test_an_output_belongs_to_one_evaluation_of_one_model(
    finished: tuple[Path, EvaluationResult], encoder: str, data: str, tmp_path: Path
):
    output, _ = finished
    with pytest.raises(InputError, match="different: propagation"):
        suite.run(config_for(encoder, data, output, propagation=PropagationConfig(top_k=4, radius=2, queue=3)))
    (tmp_path / "export").mkdir()
    export_rsp(tmp_path / "export", perturbed())
    config = config_for(str(tmp_path / "export"), data, tmp_path / "result", num_overlays=0)
    suite.run(config)
    other = perturbed()
    next(other.parameters()).data.add_(1.0)
    export_rsp(tmp_path / "export", other)
    with pytest.raises(InputError, match=r"rates .* but .* now is"):
        suite.run(config)


def test_versions_and_digests_tell_protocols_and_data_apart(
    finished: tuple[Path, EvaluationResult], encoder: str, data: str, tmp_path: Path
):
    result = finished[1]
    other = suite.run(config_for(encoder, data, tmp_path / "a", short_side=32, num_overlays=0, arms=()))
    assert other.suite_version != result.suite_version
    assert other.data_digest == result.data_digest
    folder = tmp_path / "davis"
    frames, labels = moving_squares(1)
    frames[3, 60, 60] = 255
    write_davis_sequence(folder, "one-mover", frames_THW3=frames, labels_THW=labels)
    write_davis_split(folder, ("one-mover",))
    changed = suite.run(config_for(encoder, str(folder), tmp_path / "b", num_overlays=0, arms=()))
    assert changed.suite_version == result.suite_version
    assert changed.data_digest != result.data_digest
    refusal = decide(changed, result, encoder_rule())
    assert any("data digest" in reason for reason in refusal.reasons)


def test_two_processes_give_the_same_result_as_one(
    finished: tuple[Path, EvaluationResult], encoder: str, data: str, tmp_path: Path
):
    spread = suite.run(config_for(encoder, data, tmp_path, workers=2))
    for name, score in finished[1].scores.items():
        assert spread.scores[name].value == pytest.approx(score.value, abs=1e-6)
    assert [item.item_id for item in spread.items] == [item.item_id for item in finished[1].items]


def test_the_matmul_library_is_chosen_for_the_run_only(encoder: str, data: str, tmp_path: Path):
    before = torch.get_float32_matmul_precision()
    result = suite.run(config_for(encoder, data, tmp_path, num_overlays=0, arms=(), matmul="auto"))
    assert torch.get_float32_matmul_precision() == before
    assert result.scores["J&F"].value > 0.8


@pytest.mark.s3
def test_results_and_pictures_go_to_object_storage(encoder: str, data: str, moto_s3: str):
    output = f"{moto_s3}/label-propagation"
    result = suite.run(config_for(encoder, data, output, arms=("copy-first-mask",)))
    assert set(list_names(output, recursive=True)) == {"config.json", "result.json", *result.artefacts.values()}


def test_main_runs_a_config_file_and_says_what_is_wrong_in_one_line(
    encoder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.json"
    config = config_for(encoder, data, tmp_path / "out", num_overlays=0, arms=())
    config.save(path)
    assert evaluation_main.main([str(path)]) == 0
    assert (tmp_path / "out/result.json").is_file()
    for value, words in (
        (
            {"kind": "label-propagaton"},
            "unknown kind 'label-propagaton'. Use one of label-propagation, rollouts, calvin, video-prediction.",
        ),
        (config.to_json() | {"shortside": 3}, "Did you mean 'short_side'?"),
        (config.to_json() | {"data": str(tmp_path), "output": str(tmp_path / "no")}, "val.txt is missing"),
        (config.to_json() | {"short_side": 60, "output": str(tmp_path / "odd")}, "not a whole number of patches"),
    ):
        path.write_text(json.dumps(value))
        assert evaluation_main.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 854), (480, 832)),
        ((480, 880), (480, 832)),
        ((480, 910), (480, 896)),
        ((854, 480), (832, 480)),
        ((1080, 1920), (480, 832)),
        ((256, 256), (480, 480)),
    ],
)
def test_davis_pictures_get_the_published_working_size(size: tuple[int, int], expected: tuple[int, int]):
    assert working_size(size, davis_dino(encoder="e", data="d", output="o")) == expected


def test_the_rsp_protocol_stretches_pictures_and_annotations_alike():
    frames, labels = moving_squares(2, size=120)
    config = davis_rsp(encoder="e", data="d", output="o")
    clip = prepare("x", frames, labels, stretch=config.stretch)
    assert clip.frames.shape == (NUM_FRAMES, 480, 880, 3)
    nearest = Image.fromarray(labels[2]).resize((880, 480), Image.Resampling.NEAREST)
    assert np.array_equal(clip.labels[2], np.asarray(nearest))
    buffer = io.BytesIO()
    Image.fromarray(frames[2]).resize((880, 480), Image.Resampling.NEAREST).save(buffer, "JPEG")
    assert np.array_equal(clip.frames[2], np.asarray(Image.open(buffer)))


def test_bilinear_resize_mixes_the_four_nearest_pixel_centres():
    frames = np.random.default_rng(0).integers(0, 256, (1, 10, 14, 3), dtype=np.uint8)
    for height, width in ((4, 6), (25, 28)):
        ys, xs = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in ((height, 10), (width, 14)))
        expected = np.empty((height, width, 3))
        for row, y in enumerate(np.clip(ys, 0, 9)):
            for column, x in enumerate(np.clip(xs, 0, 13)):
                top, left = min(int(y), 8), min(int(x), 12)
                corner = frames[0, top : top + 2, left : left + 2].astype(float)
                weights = np.outer([1 - (y - top), y - top], [1 - (x - left), x - left])
                expected[row, column] = (corner * weights[..., None]).sum(axis=(0, 1))
        assert np.abs(resize_bilinear(frames, (height, width))[0] - expected).max() <= 0.51
