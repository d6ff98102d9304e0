"""Runs and registered models on a database, without a server."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.config import Config
from infra.errors import InputError, ServiceError
from infra.metric_queue import MetricQueue
from infra.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry
from infra.settings import settings
from infra.tracking import Tracker, clean_key, flatten

NAME = "foreframe-encoder"


class Optim(Config):
    lr: float = 1e-3


class Run(Config):
    optim: Optim = Optim()
    gap: tuple[int, int] = (4, 48)
    note: str = "x" * 7000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("tracking")
    patch.setenv("FOREFRAME_HOME", str(folder))
    patch.delenv("FOREFRAME_TRACKING_URI", raising=False)
    settings.cache_clear()
    yield folder
    patch.undo()
    settings.cache_clear()


@pytest.fixture(scope="module")
def tracker(home):
    return Tracker()


def make_export(folder: Path, content: bytes) -> str:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "export.json").write_text(json.dumps({"id": content.hex(), "inputs": []}))
    return str(folder)


def register(tracker, folder: Path, content: bytes, run_id: str = ""):
    return Registry(tracker).register(NAME, make_export(folder, content), digest=content.hex(), run_id=run_id)


def test_config_becomes_parameters_within_the_limits_and_a_file(tracker, tmp_path):
    with tracker.start("pretrain", config=Run()) as run:
        pass
    found = tracker.client.get_run(run.run_id)
    assert found.data.params["optim.lr"] == "0.001"
    assert found.data.params["gap"] == "[4, 48]"
    assert len(found.data.params["note"]) == 6000
    assert found.info.status == "FINISHED"
    path = tracker.client.download_artifacts(run.run_id, "config.json", str(tmp_path))
    assert Run.load(Path(path)) == Run()


def test_children_and_keys(tracker):
    parent = tracker.start("flow", key="flow-1")
    child = tracker.start("stage", parent=parent.run_id)
    assert tracker.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert tracker.start("flow", key="flow-1").run_id == parent.run_id
    assert tracker.start("flow", key="flow-2").run_id != parent.run_id


def test_another_process_continues_a_run(tracker, home):
    run = tracker.start("shared")
    run.log_metrics({"loss": 3.0}, step=1)
    assert run.flush() == 0
    code = (
        "import sys; from infra.tracking import Tracker\n"
        "run = Tracker(sys.argv[1]).open(sys.argv[2])\n"
        "[run.log_metrics({'loss': 3.0 - step, 'J&F': 0.5}, step=step) for step in (2, 3)]\n"
        "run.finish()\n"
    )
    subprocess.run([sys.executable, "-c", code, tracker.uri, run.run_id], check=True, timeout=120)
    history = tracker.client.get_metric_history(run.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 1.0), (3, 0.0)]
    assert clean_key("J&F") in tracker.client.get_run(run.run_id).data.metrics


def test_dataset_carries_the_manifest_digest(tracker):
    digest = "ab" * 32
    run = tracker.start("with-data")
    run.log_dataset("corpus", url="s3://bucket/corpus", digest=digest)
    found = tracker.client.get_run(run.run_id)
    (entry,) = found.inputs.dataset_inputs
    assert json.loads(entry.dataset.source) == {"url": "s3://bucket/corpus", "manifest_sha256": digest}
    assert found.data.tags["data.manifest_sha256"] == digest


def test_a_version_holds_the_exports_own_files(tracker, tmp_path):
    run = tracker.start("train")
    version = register(tracker, tmp_path / "export", b"weights-a", run.run_id)
    assert version.aliases == (CANDIDATE,)
    folder = Registry(tracker).download(NAME, CANDIDATE, tmp_path / "copy")
    assert (folder / "model.safetensors").read_bytes() == b"weights-a"
    assert not list(folder.rglob("*.pkl"))
    Registry(tracker).log_metrics(NAME, version.version, {"J&F": 0.25})
    assert tracker.client.get_run(run.run_id).data.metrics["J_and_F"] == 0.25


def test_equal_weights_are_one_version(tracker, tmp_path):
    first = register(tracker, tmp_path / "one", b"weights-b")
    again = register(tracker, tmp_path / "two", b"weights-b")
    assert again.version == first.version


def test_promotion_moves_both_aliases_and_repeats_without_effect(tracker, tmp_path):
    registry = Registry(tracker)
    assert registry.alias(NAME, CHAMPION) is None
    old = register(tracker, tmp_path / "old", b"weights-old").version
    new = register(tracker, tmp_path / "new", b"weights-new").version
    registry.promote(NAME, old, reasons=["first version passes its floors"])
    assert registry.alias(NAME, PREVIOUS) is None
    for _ in range(2):
        promoted = registry.promote(NAME, new, reasons=["better by 0.1"])
        assert (registry.alias(NAME, CHAMPION).version, registry.alias(NAME, PREVIOUS).version) == (new, old)
    assert (promoted.tags["gate.status"], promoted.gate_reasons) == ("promoted", ("better by 0.1",))
    bad = register(tracker, tmp_path / "bad", b"weights-bad").version
    rejected = registry.reject(NAME, bad, reasons=["worse"])
    assert (rejected.tags["gate.status"], rejected.aliases) == ("rejected", (CANDIDATE,))
    assert registry.alias(NAME, CHAMPION).version == new


def test_a_missing_version_is_named(tracker):
    with pytest.raises(InputError, match="no version 999"):
        Registry(tracker).version(NAME, 999)


def test_a_server_that_is_away_never_holds_up_a_step(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracker("http://127.0.0.1:9")
    run = away.open("0" * 32)
    started = time.monotonic()
    for step in range(200):
        run.log_metrics({"loss": 1.0}, step=step)
    assert time.monotonic() - started < 1.0
    assert run.flush(timeout_s=1.0) == 200
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9"):
        away.start("flow")


def test_the_queue_delivers_in_order_after_an_outage_and_counts_what_it_dropped():
    delivered: list[int] = []
    outage = [True]

    def send(batch):
        if outage[0]:
            raise ServiceError("away")
        delivered.extend(batch)

    metrics = MetricQueue[int](send, capacity=1500, every_s=0.01, retry_s=0.01)
    metrics.put(range(1000))
    time.sleep(0.1)
    metrics.put(range(1000, 2000))
    outage[0] = False
    assert metrics.flush(timeout_s=5.0) == 500
    assert delivered == list(range(500, 2000))


def test_flatten_keeps_lists_and_empty_mappings_whole():
    assert flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {
        "a.b": '[1, {"c": 2}]',
        "a.d": "{}",
        "e": "null",
    }
