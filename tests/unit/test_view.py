"""`foreframe view`: what the page is told, bytes as they are stored, and what is refused."""

from __future__ import annotations

import http.client
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

from evaluation.view.media import UnsatisfiableError, parse_range
from evaluation.view.series import MAX_POINTS, series_of
from evaluation.view.server import Viewer
from infra.digests import pretty_json
from infra.errors import InputError, ServiceError
from infra.storage import join, put_folder
from ingest.reader import ShardDataset
from ingest.schema import frame_suffix, video_suffix
from ingest.shard import Member
from tests.helpers_data import (
    edit_manifest,
    jpeg,
    key_of,
    moving_square,
    mp4,
    npz,
    sample_record,
    write_dataset,
)

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\"'&"
FAILURE = {"sha256": "", "stage": "probe", "key": "f"}
NUM_CLIPS, NUM_FRAMES, SIZE = 7, 10, 32


def make_dataset(folder: Path, layout: str) -> str:
    """Two cameras, arrays, three labels, a held-out clip, one clip of unverified length, one with a hostile caption."""

    def sample(number: int) -> list[Member]:
        views = {name: moving_square(NUM_FRAMES, SIZE, 10 * number + at) for at, name in enumerate(("main", "wrist"))}
        base = sample_record(number, layout, NUM_FRAMES, SIZE, metadata={}, has_arrays=True)
        camera = base.cameras["main"].model_copy(update={"length": "unverified" if number == 3 else "declared"})
        record = base.model_copy(
            update={
                "cameras": {"main": camera, "wrist": camera},
                "label": ("push", "Pull", HOSTILE)[number % 3],
                "text": HOSTILE if number == 2 else f"move the square {number}",
                "metadata": {"split": "validation" if number == 6 else "train", HOSTILE: {"deep": [1, HOSTILE]}},
            }
        )
        arrays = {"actions": np.full((NUM_FRAMES - 1, 3), np.nan), "proprioception": np.eye(NUM_FRAMES)}
        pictures = [
            member
            for name, frames in views.items()
            for member in (
                [Member(frame_suffix(at, name), jpeg(frame), at) for at, frame in enumerate(frames)]
                if layout == "frames"
                else [Member(video_suffix(name), mp4(frames))]
            )
        ]
        return [Member("json", pretty_json(record.to_json())), *pictures, Member("npz", npz(arrays))]

    url = write_dataset(folder, NUM_CLIPS, NUM_FRAMES, sample, layout=layout, clips_per_shard=3)
    edit_manifest(folder, _add_failures)
    return url


def _add_failures(manifest: dict) -> None:
    reasons = ("truncated", "empty", "truncated")
    manifest["receipts"][0]["failures"] = [
        FAILURE | {"source_id": f"bad/{n}", "path": f"bad/{n}{HOSTILE}.mp4", "reason": reason, "message": HOSTILE}
        for n, reason in enumerate(reasons)
    ]
    manifest["num_failures"] = len(reasons)


@contextmanager
def serving(url: str):
    with Viewer(url) as viewer:
        thread = threading.Thread(target=viewer.serve, daemon=True)
        thread.start()
        viewer.site.api.table.join()
        yield Client(int(re.search(r":(\d+)/$", viewer.address)[1]))
        viewer.shutdown()
        thread.join(5)


class Client:
    """One request a connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, *, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, dict(response.headers), body

    def json(self, name: str, **query: object):
        status, headers, body = self.ask(f"/api/{name}?{urlencode(query)}")
        assert (status, headers["Content-Type"]) == (200, "application/json"), body
        return json.loads(body)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> dict[str, str]:
    return {name: make_dataset(tmp_path_factory.mktemp(name) / "data", name) for name in ("frames", "video")}


@pytest.fixture(scope="module")
def frames(urls):
    with serving(urls["frames"]) as client:
        yield client


@pytest.fixture(scope="module")
def video(urls):
    with serving(urls["video"]) as client:
        yield client


def keys(answer: dict) -> list[str]:
    return [row["key"] for row in answer["rows"]]


def test_the_data_set_and_its_choices(video, urls):
    told = video.json("dataset")
    assert (told["layout"], told["num_samples"], told["num_read"], told["num_failures"]) == ("video", 7, 7, 3)
    assert told["version"] == ShardDataset(urls["video"]).version
    assert [(c["value"], c["count"]) for c in told["choices"]["split"]] == [("train", 6), ("validation", 1)]
    assert {c["value"] for c in told["choices"]["label"]} == {"push", "Pull", HOSTILE}
    assert [(r["value"], r["count"]) for r in told["reasons"]] == [("truncated", 2), ("empty", 1)]


def test_pages_are_parts_of_one_list(frames):
    whole = frames.json("samples")
    assert (whole["total"], keys(whole)) == (7, [key_of(n) for n in range(7)])
    pages = [frames.json("samples", offset=first, limit=3) for first in (0, 3, 6, 9)]
    assert [key for page in pages for key in keys(page)] == keys(whole)
    assert pages[1]["offset"] == 3 and pages[3]["rows"] == []
    assert whole["rows"][0]["cameras"] == ["main", "wrist"]
    assert frames.ask("/api/samples?offset=-1")[0] == frames.ask("/api/samples?limit=x")[0] == 404


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ({"label": "push"}, [0, 3, 6]),
        ({"label": HOSTILE}, [2, 5]),
        ({"split": "validation"}, [6]),
        ({"corpus": "synthetic"}, range(7)),
        ({"corpus": "other"}, []),
        ({"unverified": "1"}, [3]),
        ({"text": "SQUARE pull"}, [1, 4]),  # every word somewhere: caption, label, key or source id
        ({"text": "clip-00005"}, [5]),
        ({"text": "push", "split": "train"}, [0, 3]),
    ],
)
def test_filters(frames, query, numbers):
    answer = frames.json("samples", **query)
    assert (answer["total"], keys(answer)) == (len(numbers), [key_of(n) for n in numbers])


def test_a_clip_has_a_place_in_the_filtered_list(frames):
    assert frames.json("samples", label="push", around=key_of(3), limit=1)["position"] == 1
    assert frames.json("samples", label="push", around=key_of(4))["position"] is None
    assert frames.json("samples", around="square/00004")["position"] == 4


def test_one_clip_by_key_or_source_id(video):
    sample = video.json("sample", key=key_of(3))
    assert sample == video.json("sample", key="square/00003")
    assert [camera["length"] for camera in sample["cameras"]] == ["unverified", "unverified"]
    assert (sample["num_frames"], sample["fps"], sample["duration"]) == (10, 30.0, "0.3 s")
    status, _, body = video.ask("/api/sample?key=nowhere")
    assert status == 404 and body == b"No clip of this data set has the key or source id 'nowhere'.\n"


def test_arrays_are_series_over_the_frames(video):
    actions, proprioception = video.json("arrays", key=key_of(0))[:2]
    assert actions["name"] == "actions" and actions["frames"] == list(range(9))
    assert actions["dims"] == [[None] * 9] * 3  # no NaN in JSON
    assert np.array_equal(np.array(proprioception["dims"]), np.eye(10))


def test_long_wide_and_odd_arrays():
    long, flag, odd, single = series_of(
        {
            "a_long": np.stack([np.arange(9000.0), np.full(9000, np.inf)], axis=1),
            "b_flag": np.array([True, False, True]),
            "c_odd": np.array(["x"]),
            "d_single": np.float32(3),
        },
        num_frames=3,
    )
    assert len(long["frames"]) == MAX_POINTS and long["every"] == 5
    assert (long["frames"][0], long["frames"][-1]) == (0, 2)  # spread over the frames there are
    assert long["dims"][0][-1] == 8999 and long["dims"][1] == [None] * MAX_POINTS
    assert flag["dims"] == [[1, 0, 1]] and flag["frames"] == [0, 1, 2]
    assert odd["problem"] == "not numbers" and "3" in single["problem"]
    wide = series_of({"wide": np.zeros((2, 10, 10))}, num_frames=2)[0]
    assert (len(wide["dims"]), wide["num_dims"]) == (64, 100)


def test_the_ledger_by_reason(frames):
    assert frames.json("failures")["total"] == 3
    chosen = frames.json("failures", reason="truncated")
    assert [row["source_id"] for row in chosen["rows"]] == ["bad/0", "bad/2"]
    assert [row["source_id"] for row in frames.json("failures", text="bad/1")["rows"]] == ["bad/1"]


def test_pictures_are_the_stored_bytes(frames, urls):
    data = ShardDataset(urls["frames"])
    for clip, camera, index in ((0, "main", 0), (4, "wrist", 9)):
        status, headers, body = frames.ask(f"/frame/{key_of(clip)}/{camera}/{index}.jpg")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert body == data.jpegs(clip, [index], camera)[0]
    for path in ("main/10.jpg", "main/-1.jpg", "main/1.png", "nose/0.jpg", "main/²..jpg".encode().hex()):
        assert frames.ask(f"/frame/{key_of(0)}/{path}")[0] == 404, path
    assert frames.ask(f"/video/{key_of(0)}/main.mp4")[0] == 404


def test_any_range_of_a_video_is_the_readers_bytes(video, urls):
    path, whole = f"/video/{key_of(5)}/wrist.mp4", ShardDataset(urls["video"]).video(5, "wrist")
    status, headers, body = video.ask(path)
    assert (status, body, headers["Accept-Ranges"]) == (200, whole, "bytes")
    assert whole[4:8] == b"ftyp" and headers["Content-Type"] == "video/mp4"
    size = len(whole)
    for header, start, end in (
        ("bytes=0-", 0, size),
        ("bytes=0-0", 0, 1),
        ("bytes=100-299", 100, 300),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size + 99}", 5, size),
    ):
        status, headers, body = video.ask(path, Range=header)
        assert (status, body) == (206, whole[start:end]), header
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    status, headers, _ = video.ask(path, Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert video.ask(path, Range="bytes=0-1,4-5")[0] == video.ask(path, Range="lines=1-2")[0] == 200
    assert video.ask(f"/frame/{key_of(0)}/main/0.jpg")[0] == 404


def test_ranges_in_words():
    assert parse_range("bytes=9-3", 20).is_part is False
    assert parse_range("bytes=-", 20).is_part is False
    assert parse_range("bytes=-99", 20).start == 0
    for header in ("bytes=20-", "bytes=-0"):
        with pytest.raises(UnsatisfiableError):
            parse_range(header, 20)


def test_foreign_text_never_becomes_html(frames):
    for path in ("samples", f"sample?key={key_of(2)}", "failures", "dataset", f"sample?key={urlencode({'': HOSTILE})}"):
        _, headers, body = frames.ask(f"/api/{path}")
        assert headers["Content-Type"].split(";")[0] in {"application/json", "text/plain"}
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"\x1b" not in body and "\u202e".encode() not in body
    assert "\\x1b[31m\\u202e" in frames.json("sample", key=key_of(2))["text"]
    page = frames.ask("/")[2].decode()
    assert re.findall(r"<script(?![^>]* src=)", page) == re.findall(r"\son\w+=|style=", page) == []
    scripts = set(re.findall(r'src="([^"]+\.js)"', page))
    assert scripts == {"/static/app.js"}
    for name in ("app", "cameras", "dom", "list", "player", "plots"):
        status, headers, body = frames.ask(f"/static/{name}.js")
        assert status == 200 and headers["Content-Type"].startswith("text/javascript")
        assert not re.search(
            rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", body
        )


def test_every_answer_carries_the_policy(frames):
    for path in ("/", "/static/style.css", "/api/dataset", "/nowhere", f"/frame/{key_of(0)}/main/0.jpg"):
        headers = frames.ask(path)[1]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not any(name.lower().startswith("access-control") for name in headers)
        assert headers["Server"] == "foreframe"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost:80:80", "", "0.0.0.0", "a@localhost"]
)
def test_a_foreign_host_is_refused(frames, host):
    status, _, body = frames.ask("/api/dataset", Host=host)
    assert status == 403 and b"synthetic" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_loopback_names_are_let_in(frames, host):
    assert frames.ask("/api/dataset", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "ODD"])
def test_only_get(frames, method):
    status, headers, _ = frames.ask("/api/dataset", method=method)
    assert (status, headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path",
    [
        "/../manifest.json",
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/static/",
        "//etc/passwd",
        "/frame/../../etc/passwd.jpg",
        "/video/clip-00000/..%2f..%2fmanifest.json.mp4",
        "/api/__init__",
        "/%00",
    ],
)
def test_nothing_lies_beside_the_page(frames, video, path):
    for client in (frames, video):
        status, headers, body = client.ask(path)
        assert (status, headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
        assert body.count(b"\n") == 1


def test_a_damaged_shard_hides_no_other(urls, tmp_path):
    folder = tmp_path / "data"
    put_folder(Path(urls["frames"]), folder)
    (folder / "shard-00001.tar").unlink()
    with serving(str(folder)) as client:
        told = client.json("dataset")
        assert (told["num_read"], told["num_problems"], len(told["problems"])) == (7, 3, 1)
        assert keys(client.json("samples")) == [key_of(n) for n in (0, 1, 2, 6)]
        assert client.ask(f"/api/sample?key={key_of(4)}")[0] == 404


def test_a_clip_that_is_not_read_yet_is_asked_for_again(urls):
    viewer = Viewer(urls["frames"])  # not entered: nothing is read
    thread = threading.Thread(target=viewer.serve, daemon=True)
    thread.start()
    status, headers, body = Client(int(viewer.address.rsplit(":", 1)[1].strip("/"))).ask(f"/api/sample?key={key_of(1)}")
    assert (status, headers["Retry-After"]) == (503, "1") and b"0 of 7" in body
    viewer.shutdown()
    with viewer:
        pass


def test_no_data_set_and_no_port(urls, tmp_path):
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        Viewer(str(tmp_path))
    with serving(urls["frames"]) as client, pytest.raises(ServiceError, match="--port 0"):
        Viewer(urls["frames"], port=client.port)


@pytest.mark.s3
def test_a_remote_list_needs_no_shard(moto_s3, urls, tmp_path, monkeypatch):
    from infra.settings import settings

    monkeypatch.setenv("FOREFRAME_CACHE_FOLDER", str(tmp_path / "cache"))
    settings.cache_clear()
    url = join(moto_s3, "view")
    put_folder(Path(urls["frames"]), url, last="manifest.json")
    tars = {receipt.tar_sha256 for receipt in ShardDataset(url).manifest.receipts}
    with serving(url) as client:
        assert keys(client.json("samples", text="square 5")) == [key_of(5)]
        assert client.json("samples")["total"] == 7
        assert not tars & {path.name for path in (tmp_path / "cache").iterdir()}
        expected = ShardDataset(urls["frames"]).jpegs(6, [2], "wrist")[0]
        assert client.ask(f"/frame/{key_of(6)}/wrist/2.jpg")[2] == expected
    settings.cache_clear()
