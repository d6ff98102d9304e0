"""Metrics of a run reach the tracker, and a tracker that is away does not stop a run."""

import pytest

from infra.tracking import Tracker
from tests.helpers_data import make_frames_dataset
from tests.helpers_training import small_pretrain
from training.launch import launch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_frames_dataset(tmp_path_factory.mktemp("frames"), num_clips=6, num_frames=20, size=40)


def test_the_metrics_of_each_logged_step_are_in_the_callers_run(data, tmp_path):
    tracker = Tracker(f"sqlite:///{tmp_path / 'tracking.db'}", experiment="training")
    run = tracker.start("pretrain")
    where = (f"tracking.run_id={run.run_id}", f"tracking.uri={tracker.uri}", "log_every_steps=4")
    summary = launch(small_pretrain(data, tmp_path / "run", *where))
    history = tracker.client.get_metric_history(run.run_id, "train/loss")
    assert [entry.step for entry in history] == [1, 4, 8, 12]
    assert history[0].value == pytest.approx(summary["first"]["loss"])


def test_an_absent_tracker_does_not_stop_training(data, tmp_path):
    where = ("tracking.run_id=0123456789abcdef0123456789abcdef", "tracking.uri=http://127.0.0.1:9")
    assert launch(small_pretrain(data, tmp_path, *where, "schedule.steps=4"))["steps"] == 4
