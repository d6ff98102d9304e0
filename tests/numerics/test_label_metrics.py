"""J, F, PCK and mean IoU against the toolkit's numbers and plain statements of their definitions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.label_propagation import boundary_accuracy, davis_scores, mean_iou, pck, region_similarity
from evaluation.label_propagation.metrics import davis_summary, resize_nearest
from infra.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def golden():
    with np.load(ASSETS / "davis_metrics_reference.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def test_sequence_scores_equal_the_toolkits_exactly(golden):
    scores = davis_scores(golden["seq_a/gt"], golden["seq_a/pred"])
    assert np.array_equal(scores.region, golden["seq_a/J_object_frame"])
    assert np.array_equal(scores.boundary, golden["seq_a/F_object_frame"])
    names = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
    ours = np.stack([scores.statistics[name] for name in names], axis=1)
    assert np.abs(ours - golden["seq_a/stats_JM_JR_JD_FM_FR_FD"]).max() < 1e-12


def test_edge_cases_equal_the_toolkits_exactly(golden):
    pairs = list(zip(golden["edge/gt"], golden["edge/pred"], strict=True))
    assert [region_similarity(*pair) for pair in pairs] == golden["edge/J"].tolist()
    assert [boundary_accuracy(*pair) for pair in pairs] == golden["edge/F"].tolist()


def test_boundary_matching_reaches_exactly_the_tolerance():
    # Diagonal 1000: tolerance ceil(0.008 * 1000) = 8 pixels.
    truth, near, far = (np.zeros((600, 800), dtype=bool) for _ in range(3))
    truth[100:400, 100:300] = True
    near[100:400, 108:308] = True
    far[100:400, 109:309] = True
    assert boundary_accuracy(truth, near) == 1.0
    assert boundary_accuracy(truth, far) < 0.8
    assert boundary_accuracy(truth, far, tolerance=0.009) == 1.0


def test_void_is_background_missing_objects_are_empty_and_extra_ones_an_error():
    truth = np.zeros((5, 20, 30), dtype=np.uint8)
    truth[:, 2:8, 2:8], truth[:, 10:16, 12:20], truth[:, 18:, :] = 1, 2, 255
    prediction = np.where(truth == 1, 1, 0)
    scores = davis_scores(truth, prediction)
    assert scores.region.tolist() == [[1.0] * 3, [0.0] * 3]
    assert scores.boundary.tolist() == [[1.0] * 3, [0.0] * 3]
    with pytest.raises(InputError, match="object 3"):
        davis_scores(truth, np.where(truth == 2, 3, 0))
    with pytest.raises(InputError, match="at least 3 frames"):
        davis_scores(truth[:2], prediction[:2])


def test_only_inner_frames_count_and_objects_weigh_equally():
    truth = np.zeros((6, 10, 10), dtype=np.uint8)
    truth[:, :5], truth[:, 5:, :5] = 1, 2
    prediction = truth.copy()
    prediction[[0, -1]] = 0  # given and dropped
    perfect = davis_scores(truth, prediction)
    assert perfect.region.min() == perfect.boundary.min() == 1.0
    single = davis_scores(np.minimum(truth, 1), np.zeros_like(truth))
    assert davis_summary([perfect, single])["J-Mean"] == pytest.approx(2 / 3)
    assert davis_summary([perfect, single])["J&F-Mean"] == pytest.approx(2 / 3)


def test_decay_compares_the_outer_quarters_which_share_their_edges_with_the_inner_ones():
    # Ten scored frames: quarters end at frames 1, 3, 6 (5.5 rounds up), 8, 10, counted from 1.
    truth = np.zeros((12, 10, 10), dtype=np.uint8)
    truth[:, :, :5] = 1
    prediction = truth.copy()
    overlaps = np.array([10, 9, 7, 6, 6, 5, 5, 2, 4, 1])
    for frame, rows in enumerate(overlaps, start=1):
        prediction[frame, rows:] = 0
    decay = davis_scores(truth, prediction).statistics["J-Decay"]
    assert decay == pytest.approx([(overlaps[:3].mean() - overlaps[7:].mean()) / 10])


def plain_pck(truth, prediction, threshold):
    """The JHMDB convention, one joint at a time; lists of (2, J, T)."""
    num_joints = truth[0].shape[1]
    hits, totals = [0] * num_joints, [0] * num_joints
    for true, predicted in zip(truth, prediction, strict=True):
        for t in range(1, true.shape[2]):
            seen = [j for j in range(num_joints) if predicted[0, j, t] >= 0]
            xs, ys = [true[0, j, t] for j in seen], [true[1, j, t] for j in seen]
            scale = 0.6 * ((max(xs) - min(xs)) ** 2 + (max(ys) - min(ys)) ** 2) ** 0.5
            for j in seen:
                distance = float(np.linalg.norm(true[:, j, t] - predicted[:, j, t]))
                hits[j] += distance <= threshold * scale
                totals[j] += 1
    return [100 * hit / total for hit, total in zip(hits, totals, strict=True)]


def test_pck_equals_a_plain_statement_over_several_videos():
    generator = np.random.default_rng(0)
    truth = [generator.uniform(0, 100, size=(2, 15, frames)) for frames in (9, 4)]
    prediction = [np.abs(video + generator.normal(0, 8, size=video.shape)) for video in truth]
    prediction[0][:, 3, 2:5] = -1
    scores = pck(truth, prediction, thresholds=(0.1, 0.2))
    for row, threshold in enumerate((0.1, 0.2)):
        expected = plain_pck(truth, prediction, threshold)
        assert scores.per_joint[row] == pytest.approx(expected)
        assert scores.mean[row] == pytest.approx(np.mean(expected))
    assert scores.num_lost == 3
    assert pck(truth[0], prediction[0], thresholds=(0.1,)).per_joint[0] == pytest.approx(
        plain_pck(truth[:1], prediction[:1], 0.1)
    )


def test_pck_reports_a_joint_that_was_never_found():
    truth = np.random.default_rng(1).uniform(0, 50, size=(2, 4, 3))
    prediction = truth.copy()
    prediction[:, 2] = -1
    scores = pck(truth, prediction, thresholds=(0.1,))
    assert np.isnan(scores.per_joint[0, 2])
    assert scores.mean[0] == 100.0
    assert scores.num_lost == 2


def plain_mean_iou(truth, prediction, num_classes):
    """Per class: pixels both, over pixels either, all images together; truth out of range is not counted."""
    values = []
    for label in range(num_classes):
        both = either = 0
        for true, predicted in zip(truth, prediction, strict=True):
            counted = (true >= 0) & (true < num_classes)
            both += int(((true == label) & (predicted == label) & counted).sum())
            either += int((((true == label) | (predicted == label)) & counted).sum())
        if either:
            values.append(both / either)
    return sum(values) / len(values)


def test_mean_iou_equals_a_plain_statement():
    generator = np.random.default_rng(4)
    truth = generator.integers(0, 5, size=(3, 20, 30))
    prediction = np.where(generator.random(truth.shape) < 0.7, truth, generator.integers(0, 5, size=truth.shape))
    truth[0, :4] = 255
    expected = plain_mean_iou(truth, prediction, 7)  # classes 5 and 6 are absent from both
    assert mean_iou(truth, prediction, num_classes=7) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match=r"outside 0\.\.3"):
        mean_iou(truth % 4, prediction, num_classes=4)


def test_predictions_of_another_size_are_resized_by_pixel_centres():
    labels = np.random.default_rng(5).integers(0, 9, size=(13, 22)).astype(np.uint8)
    for height, width in ((13, 22), (5, 40), (39, 9), (26, 44)):
        theirs = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
        assert np.array_equal(resize_nearest(labels, (height, width)), theirs)
    truth = np.zeros((8, 8), dtype=int)
    truth[:, 4:] = 1
    assert mean_iou(truth, truth[::2, ::2], num_classes=2) == 1.0
