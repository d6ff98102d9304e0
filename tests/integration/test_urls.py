"""A table of addresses becomes a data set: a real web server with planted faults, kills, repeats, S3."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.errors import ConfigError, InputError, TooManyFailuresError
from infra.processes import wait_for
from infra.settings import settings
from infra.storage import join, list_names, put_file, put_folder, write_bytes
from ingest import job
from ingest.corpora import urls
from ingest.download_records import read_outcomes, read_rows
from ingest.downloads import DownloadConfig, fetch_table
from ingest.host_queue import HostQueue
from ingest.reader import ShardDataset
from ingest.receipt import failure_ledger
from ingest.verify import verify
from pipelines import cli
from tests.helpers_http import send, site, trickle
from tests.helpers_urls import QUICK, config_of, write_csv

PROJECT = Path(__file__).parents[2]


def plant_faults(web, web_videos) -> list[dict]:
    def flaky(handler):
        send(handler, *((500, b"") if web.hits["/flaky.webm"] == 1 else (200, web_videos[2])))

    web.routes["/flaky.webm"] = flaky
    web.routes["/busy.mp4"] = lambda handler: send(handler, 503)
    web.routes["/cut.mp4"] = lambda handler: send(handler, 200, web_videos[3][:2000], length=len(web_videos[3]))
    web.routes["/half"] = lambda handler: send(handler, 200, web_videos[3][:2000], {"Content-Type": "video/quicktime"})
    web.routes["/inside"] = lambda handler: send(handler, 302, headers={"Location": "http://169.254.169.254/latest"})
    first = web.url("/v0.mp4")
    return [
        {"url": first, "caption": "whole", "start_s": "", "end_s": ""},
        {"url": first, "caption": "first second", "start_s": "0", "end_s": "1"},
        {"url": first, "caption": "the same again", "start_s": "0.0", "end_s": "1.0"},
        {"url": web.url("/flaky.webm?token=canary"), "caption": "at the second attempt", "start_s": "", "end_s": ""},
        {"url": web.url("/gone.mp4?token=canary"), "caption": "", "start_s": "", "end_s": ""},
        {"url": web.url("/busy.mp4"), "caption": "", "start_s": "", "end_s": ""},
        {"url": web.url("/cut.mp4"), "caption": "", "start_s": "", "end_s": ""},
        {"url": web.url("/half"), "caption": "arrives, and is no whole video", "start_s": "", "end_s": ""},
        {"url": web.url("/inside"), "caption": "", "start_s": "", "end_s": ""},
        {"url": "http://10.0.0.1/x.mp4", "caption": "", "start_s": "", "end_s": ""},
        {"url": "/etc/passwd", "caption": "", "start_s": "", "end_s": ""},
        {"url": "", "caption": "nowhere", "start_s": "", "end_s": ""},
        {"url": first, "caption": "backwards", "start_s": "2", "end_s": "1"},
    ]


def test_from_a_table_to_a_data_set(web, web_videos, tmp_path):
    table = write_csv(tmp_path / "table.csv", plant_faults(web, web_videos))
    output = tmp_path / "data"
    manifest = job.run(config_of(table, output))
    data = ShardDataset(str(output))
    records = {record.text: record for record in (data.record(index) for index in range(len(data)))}
    assert set(records) == {"whole", "first second", "at the second attempt"}
    assert records["first second"].cameras["main"].num_frames == 12
    assert records["whole"].cameras["main"].num_frames == 24
    assert records["whole"].metadata["address"] == web.url("/v0.mp4")
    assert records["at the second attempt"].cameras["main"].source.path.endswith(".webm")
    ledger = {
        (failure.stage, failure.reason, failure.message.partition(": ")[0])
        for failure in failure_ledger(manifest.receipts)
    }
    assert ledger == {
        ("download", "not_found", web.url("/gone.mp4")),
        ("download", "download_failed", web.url("/busy.mp4")),
        ("download", "download_failed", web.url("/cut.mp4")),
        ("download", "download_refused", f"{web.url('/inside')} leads on"),
        ("download", "download_refused", "http://10.0.0.1/x.mp4 is not fetched"),
        ("download", "download_refused", "/etc/passwd is not fetched"),
        ("probe", "truncated", "the container's header cannot be read"),
        ("annotation", "bad_annotation", "table.csv row 12 holds no address"),
        ("annotation", "bad_annotation", "table.csv row 13 has seconds '2' to '1'"),
    }
    assert web.hits["/v0.mp4"] == web.hits["/gone.mp4"] == web.hits["/half"] == 1
    assert web.hits["/flaky.webm"] == 2 and web.hits["/busy.mp4"] == web.hits["/cut.mp4"] == 3
    assert verify(str(output)) == []
    everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert b"canary" not in everything
    assert sorted(path.suffix for path in (output / "downloads").rglob("[0-9a-f]*") if len(path.stem) == 40) == [
        ".mov",
        ".mp4",
        ".webm",
    ]
    hits = web.hits.total()
    assert job.run(config_of(table, output)) == manifest  # nothing to do, nothing asked
    assert web.hits.total() == hits


def test_failed_ones_stay_failed_until_they_are_asked_for(web, web_videos, tmp_path):
    table = write_csv(tmp_path / "table.csv", [{"url": web.url(f"/{name}.mp4")} for name in ("v0", "v1", "late", "no")])
    strict = {"recipe": {"max_failure_share": 0.3}}
    with pytest.raises(TooManyFailuresError, match=r"2 of 4 rows failed.*not_found \(2\).*late.mp4.*--retry-failed"):
        job.run(config_of(table, tmp_path / "data", **strict))
    assert list_names(tmp_path / "data") == []  # no plan
    web.serve("/late.mp4", web_videos[2])
    with pytest.raises(TooManyFailuresError):
        job.run(config_of(table, tmp_path / "data", **strict))
    assert web.hits == {"/v0.mp4": 1, "/v1.mp4": 1, "/late.mp4": 1, "/no.mp4": 1}
    manifest = job.run(config_of(table, tmp_path / "data", retry_failed=True, **strict))
    assert web.hits == {"/v0.mp4": 1, "/v1.mp4": 1, "/late.mp4": 2, "/no.mp4": 2}
    assert (manifest.num_samples, manifest.num_failures) == (3, 1)
    with pytest.raises(InputError, match="new OUT and --replay-failures") as caught:
        job.run(config_of(table, tmp_path / "data", retry_failed=True, **strict))
    assert "\n" not in str(caught.value)


def test_retry_failed_belongs_to_urls(tmp_path):
    with pytest.raises(ConfigError, match="downloads nothing"):
        job.run(config_of(tmp_path, tmp_path / "data", corpus="folder", retry_failed=True))


@pytest.mark.parametrize("point", ["ingest.before_download", "ingest.after_download"])
def test_a_killed_run_goes_on_and_fetches_nothing_twice(web, web_videos, tmp_path, point):
    rows = [{"url": web.url(f"/many/{number}.mp4")} for number in range(12)]
    for number in range(12):
        web.serve(f"/many/{number}.mp4", web_videos[number % 4] + bytes(number))
    table = write_csv(tmp_path / "table.csv", [*rows, {"url": web.url("/gone.mp4")}])
    download = QUICK.model_copy(update={"concurrency": 1})
    config = config_of(table, tmp_path / "data", download=download)
    config.save(tmp_path / "config.json")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "FOREFRAME_FAULT": f"{point}:6"}
    argv = [sys.executable, "-m", "ingest.main", str(tmp_path / "config.json")]
    assert subprocess.run(argv, env=environment, timeout=120, check=False).returncode == -signal.SIGKILL
    published = 5 if point == "ingest.before_download" else 6
    assert len(list((tmp_path / "data/downloads").glob("??/*"))) == published
    assert web.hits.total() == 6 and not read_outcomes(str(tmp_path / "data/downloads"))
    manifest = job.run(config)
    assert web.hits.total() == 13 + (6 - published)  # only the file that was not there yet is asked for again
    assert (manifest.num_samples, manifest.num_failures) == (12, 1)
    assert not list((tmp_path / "data/downloads").glob(".incoming"))


def test_a_file_that_went_away_is_fetched_again(web, tmp_path):
    table = write_csv(tmp_path / "table.csv", [{"url": web.url("/v0.mp4")}, {"url": web.url("/v1.mp4")}])
    root = tmp_path / "downloads"
    fetch_table(table, str(root), QUICK)
    next(root.glob("??/*.mp4")).unlink()
    fetch_table(table, str(root), QUICK)
    assert sorted(web.hits.values()) == [1, 2]
    assert len(list(root.glob("??/*.mp4"))) == 2


def test_a_table_that_grows_costs_only_what_is_new(web, tmp_path):
    root = str(tmp_path / "downloads")
    fetch_table(write_csv(tmp_path / "a.csv", [{"url": web.url("/v0.mp4"), "text": "a"}]), root, QUICK)
    rows = [{"url": web.url(f"/v{number}.mp4"), "text": "b"} for number in (1, 0)]
    fetch_table(write_csv(tmp_path / "a.csv", rows), root, QUICK)
    assert web.hits == {"/v0.mp4": 1, "/v1.mp4": 1}
    assert [clip.text for clip in urls.list_clips(root)] == ["b", "b"]
    assert len(list_names(join(root, "rows"))) == 1


def test_one_run_at_a_time(web, tmp_path):
    table = write_csv(tmp_path / "table.csv", [{"url": web.url("/v0.mp4")}])
    code = (
        "import sys, time\nfrom ingest.downloads import _sole_user\n"
        "with _sole_user(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "root")]
    other = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(InputError, match="another run"):
            fetch_table(table, str(tmp_path / "root"), QUICK)
    finally:
        other.kill()
        other.wait()
    fetch_table(table, str(tmp_path / "root"), QUICK)


def test_a_slow_host_holds_nobody_and_has_its_limit(web, web_videos, tmp_path, monkeypatch):
    with site() as slow:
        monkeypatch.setenv("FOREFRAME_DOWNLOAD_ALLOW_HOSTS", f"{web.host},{slow.host}")
        settings.cache_clear()
        quick_ones_came, waited = threading.Event(), []

        def slowly(handler):
            waited.append(quick_ones_came.wait(20))
            time.sleep(0.05)
            send(handler, 200, web_videos[0])

        def quickly(handler):
            send(handler, 200, web_videos[0])
            if web.hits.total() == 8:
                quick_ones_came.set()

        for number in range(8):
            slow.routes[f"/{number}.mp4"] = slowly
            web.routes[f"/q{number}.mp4"] = quickly
        rows = [{"url": slow.url(f"/{number}.mp4")} for number in range(8)]
        rows += [{"url": web.url(f"/q{number}.mp4")} for number in range(8)]
        download = QUICK.model_copy(
            update={"concurrency": 4, "per_host": 2, "read_timeout_s": 30.0, "deadline_s": 60.0}
        )
        fetch_table(write_csv(tmp_path / "table.csv", rows), str(tmp_path / "root"), download)
        assert slow.busiest == 2 and web.busiest <= 2
        assert waited == [True] * 8  # none of the quick ones stood behind the slow host's


def test_turns_of_hosts():
    items = [("a", number) for number in range(4)] + [("b", 10), ("c", 20)]
    queue = HostQueue(items, per_host=2)
    taken = [queue.take() for _ in range(4)]
    assert taken == [("a", 0), ("b", 10), ("c", 20), ("a", 1)]
    queue.again("a", 0, after_s=0.05)
    assert queue.take() == ("a", 2)
    for name in "abc":
        queue.finish(name)
    started = time.monotonic()
    assert queue.take() == ("a", 3)
    queue.finish("a")
    assert queue.take() == ("a", 0) and time.monotonic() - started > 0.02
    queue.finish("a")
    queue.finish("a")
    assert queue.take() is None
    spaced = HostQueue([("a", 0), ("a", 1)], per_host=2, delay_s=0.1)
    started = time.monotonic()
    spaced.take(), spaced.take()
    assert time.monotonic() - started >= 0.1
    resting = HostQueue([("a", 0), ("a", 1)], per_host=1)
    resting.again(*resting.take(), after_s=0.1, rests=True)
    started = time.monotonic()
    assert resting.take() is not None and time.monotonic() - started > 0.08


def test_a_full_disk_stops_the_run(web, web_videos, tmp_path, monkeypatch):
    for number in range(40):
        web.serve(f"/many/{number}.mp4", web_videos[0])
    table = write_csv(tmp_path / "table.csv", [{"url": web.url(f"/many/{number}.mp4")} for number in range(40)])
    calls = []

    def full_at_first(local, url):
        calls.append(url)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        time.sleep(0.05)
        put_file(local, url)

    monkeypatch.setattr("ingest.downloads.put_file", full_at_first)
    with pytest.raises(OSError, match="No space"):
        fetch_table(table, str(tmp_path / "root"), QUICK.model_copy(update={"concurrency": 2}))
    assert web.hits.total() < 20  # the other thread did not go on to the end
    assert len(read_outcomes(str(tmp_path / "root"))) == len(calls) - 1


def test_nothing_private_without_the_setting(web, tmp_path, monkeypatch):
    table = write_csv(tmp_path / "table.csv", [{"url": web.url("/v0.mp4")}])
    monkeypatch.setenv("FOREFRAME_DOWNLOAD_ALLOW_HOSTS", "")
    settings.cache_clear()
    fetch_table(table, str(tmp_path / "root"), QUICK)
    assert web.connections == 0
    (outcome,) = read_outcomes(str(tmp_path / "root")).values()
    assert outcome.reason == "download_refused"
    monkeypatch.setenv("FOREFRAME_DOWNLOAD_ALLOW_HOSTS", "mirror.example")
    settings.cache_clear()
    with pytest.raises(ConfigError, match=r"mirror\.example"):
        fetch_table(table, str(tmp_path / "root"), QUICK)


@pytest.mark.s3
def test_tables_downloads_and_addresses_in_s3(web, web_videos, tmp_path, moto_s3):
    prefix = join(moto_s3, f"urls-{tmp_path.name}")
    write_bytes(join(prefix, "videos", "own.mp4"), web_videos[3])
    rows = [web.url("/v0.mp4"), web.url("/v1.mp4"), web.url("/gone.mp4"), join(prefix, "videos", "own.mp4")]
    rows += [join(prefix, "videos", "none.mp4"), "s3://no-such-bucket-here/x.mp4"]
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in" / "table.csv", [{"url": row} for row in rows])
    put_folder(tmp_path / "in", join(prefix, "tables"))
    config = config_of(join(prefix, "tables"), join(prefix, "data"))
    manifest = job.run(config)
    assert manifest.num_samples == 3
    reasons = sorted((failure.stage, failure.reason) for failure in failure_ledger(manifest.receipts))
    assert reasons == [("download", "not_found")] * 3
    assert verify(join(prefix, "data")) == []
    root = join(prefix, "data", "downloads")
    assert len(list(read_rows(root))) == 6
    hits = web.hits.total()
    fetch_table(join(prefix, "tables"), root, QUICK)
    assert web.hits.total() == hits


def test_the_command(web, web_videos, tmp_path):
    rows = [{"url": web.url(f"/{name}.mp4"), "caption": name} for name in ("v0", "v1", "late")]
    table = write_csv(tmp_path / "table.csv", rows)
    out = str(tmp_path / "data")
    overrides = ["-o", "workers=0", "-o", "recipe.short_side=48", "-o", "download.max_attempts=1"]
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["ingest", "urls", table, out, "--dry-run", *overrides])
    expected = {"rows": 3, "unusable_rows": 0, "addresses": 3, "hosts": 1, "downloaded": 0, "failed": {}}
    assert json.loads(shown.stdout) == expected and not web.hits and not Path(out).exists()
    stopped = runner.invoke(cli.app, ["ingest", "urls", table, out, *overrides])
    assert isinstance(stopped.exception, TooManyFailuresError)
    shown = runner.invoke(cli.app, ["ingest", "urls", table, out, "--dry-run", *overrides])
    assert json.loads(shown.stdout) == {**expected, "downloaded": 2, "failed": {"not_found": 1}}
    web.serve("/late.mp4", web_videos[2])
    done = runner.invoke(cli.app, ["ingest", "urls", table, out, "--retry-failed", *overrides])
    assert done.exit_code == 0 and "3 samples" in done.stdout
    assert web.hits == {"/v0.mp4": 1, "/v1.mp4": 1, "/late.mp4": 2}


def test_replayed_failures_fetch_those_addresses_alone(web, web_videos, tmp_path):
    rows = [{"url": web.url(f"/{name}.mp4"), "id": name} for name in ("v0", "v1", "v2", "late")]
    table = write_csv(tmp_path / "table.csv", rows)
    parent = job.run(config_of(table, str(tmp_path / "data")))
    assert (parent.num_samples, parent.num_failures) == (3, 1)
    web.serve("/late.mp4", web_videos[3])
    config = config_of(table, str(tmp_path / "child"))
    child = job.run(config.model_copy(update={"replay_failures": str(tmp_path / "data")}))
    assert (child.num_samples, child.num_failures) == (1, 0) and child.parent
    assert {name: web.hits[f"/{name}.mp4"] for name in ("v0", "v1", "v2", "late")} == {
        "v0": 1, "v1": 1, "v2": 1, "late": 2,
    }  # fmt: skip


def test_ctrl_c_does_not_wait_for_a_long_download(web, tmp_path):
    web.routes["/slow.mp4"] = lambda handler: trickle(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    table = write_csv(tmp_path / "table.csv", [{"url": web.url(f"/{name}.mp4")} for name in ("v0", "slow")])
    config = config_of(table, tmp_path / "data", download=DownloadConfig())
    config.save(tmp_path / "config.json")
    variables = {**os.environ, "PYTHONPATH": str(PROJECT)}
    argv = [sys.executable, "-m", "ingest.main", str(tmp_path / "config.json")]
    child = subprocess.Popen(argv, env=variables, stderr=subprocess.PIPE)
    try:
        assert wait_for(lambda: web.hits["/slow.mp4"] == 1 and web.hits["/v0.mp4"] == 1, timeout_s=60)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode != 0
    outcomes = read_outcomes(str(tmp_path / "data/downloads"))
    assert [outcome.reason for outcome in outcomes.values()] in ([], [""])  # given up is not failed
