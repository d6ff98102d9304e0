"""The driver sees how far workers elsewhere are."""

import json
import logging
import time
from pathlib import Path

import pytest

from training.follow import following, progress_line


def test_new_records_are_told_once_each_and_a_missing_file_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    metrics = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.INFO, "training.follow"), following(str(metrics), total_steps=20, every_s=0.02):
        time.sleep(0.1)
        metrics.write_text(json.dumps({"step": 5, "loss": 1.5, "step_s": 2.0}) + "\n")
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
    assert caplog.messages == ["step 5/20  loss 1.5000  2.00 s/step  0:30 left"]


def test_the_time_left_follows_from_steps_and_speed():
    assert progress_line({"step": 100, "loss": 0.5, "step_s": 0.5}, 400).endswith("0.50 s/step  2:30 left")
