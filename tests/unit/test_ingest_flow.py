"""What `ingest-corpus` leaves on the flow's page and its tracker run: counters of one name, the page of its data."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.report.run import build
from infra.settings import settings
from ingest.schema import Failure
from pipelines.flows.ingest_corpus import report_data_set
from tests.helpers_data import edit_manifest, make_frames_dataset


class Run:
    """Records what a flow run is told."""

    def __init__(self):
        self.tables, self.notes, self.metrics, self.tags = {}, {}, {}, {}
        self.run = SimpleNamespace(log_metrics=self.metrics.update, log_tags=self.tags.update)

    def table(self, key, rows, description):
        self.tables[key] = rows

    def note(self, key, markdown):
        self.notes[key] = markdown


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FOREFRAME_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


def make_data(folder: Path) -> str:
    url = make_frames_dataset(folder, num_clips=5, num_frames=4)
    failures = [
        Failure(key=str(n), source_id=f"s{n}", path=f"{n}.mp4", sha256="", stage="plan", reason=reason, message="m")
        for n, reason in enumerate(["truncated", "truncated", "duplicate"])
    ]

    def edit(manifest):
        manifest["receipts"][0]["failures"] = [failure.to_json() for failure in failures]
        manifest["num_failures"] = 3
        manifest["statistics"] = {"length": {"declared": 4, "unverified": 1}}

    edit_manifest(folder, edit)
    return url


def test_counters_reasons_and_length_checks_go_everywhere_under_one_name(home, tmp_path):
    run = Run()
    report_data_set(run, make_data(tmp_path / "data"))
    counters = {row["counter"]: row["value"] for row in run.tables["counters-synthetic"]}
    for name, value in {
        "ingest/clips": 5,
        "ingest/frames": 20,
        "ingest/failures/truncated": 2,
        "ingest/failures/duplicate": 1,
        "ingest/refused": 2,
        "ingest/set_aside": 1,
        "ingest/length/declared": 4,
        "ingest/length/unverified": 1,
    }.items():
        assert counters[name] == value, name
        assert run.metrics[name] == value, name
    assert [row["reason"] for row in run.tables["quarantine-synthetic"]] == ["truncated", "truncated", "duplicate"]


def test_the_page_lies_below_the_home_and_can_be_made_again(home, tmp_path):
    run, data = Run(), make_data(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in Path(data).iterdir()}
    page = Path(report_data_set(run, data, source=str(tmp_path)))
    assert page.parent.parent == home / "reports"
    assert {path: path.stat().st_mtime_ns for path in Path(data).iterdir()} == before
    assert page.as_uri() in run.notes["report-synthetic"]
    assert run.tags["data.report"] == str(page)
    assert json.loads((page.parent / "report.json").read_bytes())["datasets"][0]["source"] == str(tmp_path)
    content = page.read_text()
    page.unlink()
    assert build("dataset", str(page.parent)) == page
    assert page.read_text() == content
