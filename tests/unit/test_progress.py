"""Progress of an ingest: rates of this run alone, time left by bytes, a line in five seconds, counters of one name."""

import sys
from types import SimpleNamespace

import pytest

from infra.ray_metrics import RayMetrics
from infra.tracking import clean_key
from ingest.progress import Progress, counters_of
from ingest.schema import Failure, Receipt


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def receipt(shard: int, *, clips: int = 10, frames: int = 300, ms: int = 10_000, reasons: tuple[str, ...] = ()):
    failures = tuple(
        Failure(key=str(n), source_id=str(n), path="p", sha256="", stage="decode", reason=reason, message="m")
        for n, reason in enumerate(reasons)
    )
    return Receipt(
        shard=shard, plan_id="p", tar_sha256="t", idx_sha256="i", tar_bytes=1000, num_samples=clips, num_frames=frames,
        num_members=1, failures=failures, statistics={"milliseconds": ms},
    )  # fmt: skip


def test_time_left_follows_bytes_not_shards():
    clock = Clock()
    progress = Progress({0: 9000, 1: 500, 2: 500}, clock=clock)
    clock.now_s += 90
    line = progress.add(receipt(0))
    assert progress.rates()["ingest/eta_s"] == pytest.approx(10.0)  # a third of the shards, nine tenths of the bytes
    assert line is not None
    assert "1 of 3 shards" in line and "ETA 10 s" in line


def test_resumed_shards_are_done_but_say_nothing_of_the_speed():
    clock = Clock()
    progress = Progress({0: 1000, 1: 1000, 2: 2000}, clock=clock)
    assert progress.add(receipt(0, clips=500), resumed=True) is None
    assert "ETA unknown" in progress.line()
    clock.now_s += 10
    line = progress.add(receipt(1, clips=20, frames=600, ms=50_000))
    assert line == "2 of 3 shards, 520 clips (2.0/s), 900 frames (60.0/s), 5.0x real time, ETA 20 s"


def test_one_line_in_five_seconds_and_a_final_one():
    clock = Clock()
    progress = Progress(dict.fromkeys(range(100), 1000), clock=clock)
    lines = []
    for shard in range(100):
        clock.now_s += 0.5
        lines.append(progress.add(receipt(shard)))
    assert sum(line is not None for line in lines) == 9  # the tenth would be the final one
    assert lines[-1] is None
    assert progress.finish().startswith("100 of 100 shards, 1,000 clips (20.0/s)")
    assert "took 50 s" in progress.finish()


def test_failures_by_reason_and_decisions_apart():
    clock = Clock()
    progress = Progress({0: 1, 1: 1, 2: 1}, clock=clock)
    clock.now_s += 6
    line = progress.add(receipt(0, reasons=("truncated", "not_video", "truncated", "duplicate")))
    assert line is not None
    assert line.endswith("; refused 3 (truncated 2, not_video 1); set aside 1 (duplicate 1)")


def test_counters_add_up_and_have_names_that_trackers_take():
    receipts = [receipt(0, reasons=("truncated", "duplicate")), receipt(1, reasons=("truncated",))]
    counters = counters_of(receipts)
    assert counters == {
        "ingest/shards": 2,
        "ingest/clips": 20,
        "ingest/frames": 600,
        "ingest/tar_bytes": 2000,
        "ingest/source_seconds": 20,
        "ingest/refused": 2,
        "ingest/set_aside": 1,
        "ingest/failures/duplicate": 1,
        "ingest/failures/truncated": 2,
    }
    assert [clean_key(name) for name in counters] == list(counters)
    # A tracker that keeps metrics as files cannot have one called like the folder of others.
    assert not any(other.startswith(f"{name}/") for name in counters for other in counters)


def test_a_shard_counted_twice_counts_once():
    progress = Progress({0: 1}, clock=Clock())
    progress.add(receipt(0))
    progress.add(receipt(0))
    assert progress.counters()["ingest/clips"] == 10


def test_nothing_known_yet_divides_by_nothing():
    progress = Progress({0: 0, 1: 0}, clock=Clock())
    progress.add(receipt(0, clips=0, frames=0, ms=0))
    assert set(progress.rates()) == {"ingest/elapsed_s"}
    assert "0 clips, 0 frames" in progress.line()
    assert "0 of 0 shards" in Progress({}, clock=Clock()).finish()


class FakeMetric:
    made: list = []  # noqa: RUF012

    def __init__(self, name, description="", tag_keys=()):
        self.name, self.tag_keys, self.values = name, tag_keys, {}
        self.made.append(self)

    def inc(self, value, tags):
        key = tuple(tags.values())
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, value, tags):
        self.values[tuple(tags.values())] = value


@pytest.fixture
def fake_ray(monkeypatch):
    FakeMetric.made = []
    metrics = SimpleNamespace(Counter=FakeMetric, Gauge=FakeMetric)
    ray = SimpleNamespace(is_initialized=lambda: True, util=SimpleNamespace(metrics=metrics))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", ray.util)
    return ray


def test_ray_gets_totals_as_growth_and_reasons_as_tags(fake_ray):
    published = RayMetrics()
    first = counters_of([receipt(0, reasons=("truncated",))])
    both = counters_of([receipt(0, reasons=("truncated",)), receipt(1, reasons=("truncated", "black"))])
    assert published.publish(first, {"ingest/eta_s": 9.0})
    assert published.publish(both, {"ingest/eta_s": 4.0})
    values = {metric.name: metric.values for metric in FakeMetric.made}
    assert values["ingest_clips"] == {(): 20.0}
    assert values["ingest_failures"] == {("truncated",): 2.0, ("black",): 1.0}
    assert values["ingest_eta_s"] == {(): 4.0}
    assert len(values) == len(FakeMetric.made)  # each registered once


def test_without_a_running_ray_nothing_is_published_or_imported(monkeypatch, fake_ray):
    fake_ray.is_initialized = lambda: False
    assert not RayMetrics().publish({"ingest/clips": 1.0}, {})
    monkeypatch.delitem(sys.modules, "ray")
    assert not RayMetrics().publish({"ingest/clips": 1.0}, {})
    assert "ray" not in sys.modules
    assert FakeMetric.made == []
