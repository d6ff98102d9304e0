"""Lineage follows digests and nothing else."""

import hashlib
import json
from pathlib import Path

import pytest

from infra.errors import InputError
from infra.lineage import trace


def put(path: Path, value: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(value).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    videos = [hashlib.sha256(bytes([index])).hexdigest() for index in range(7)]
    frames = put(tmp_path / "datasets/frames/manifest.json", {"inputs": videos, "parent": ""})
    episodes = put(tmp_path / "datasets/episodes/manifest.json", {"inputs": videos[:2], "parent": ""})
    put(tmp_path / "runs/a/export/export.json", {"id": "e" * 64, "kind": "rsp", "inputs": [frames]})
    put(tmp_path / "runs/b/export/export.json", {"id": "b" * 64, "kind": "bc-policy", "inputs": [episodes, "e" * 64]})
    put(tmp_path / "runs/other/export/export.json", {"id": "f" * 64, "kind": "rsp", "inputs": ["0" * 64]})
    return tmp_path


def test_a_policy_leads_to_every_source_video_once(home: Path):
    lineage = trace(str(home / "runs/b/export"), home=str(home))
    assert lineage.root.kind == "bc-policy"
    assert [node.kind for node in lineage.nodes if node.kind != "source video"] == [
        "bc-policy",
        "data set",
        "rsp",
        "data set",
    ]
    assert sorted(node.id for node in lineage.sources) == sorted(
        hashlib.sha256(bytes([index])).hexdigest() for index in range(7)
    )
    text = lineage.text(max_sources=3)
    assert "... and 4 more source videos" in text
    assert text.splitlines()[0].startswith("bc-policy bbbbbbbbbbbb")


def test_a_digest_will_do_and_an_unknown_one_is_named(home: Path):
    assert trace("e" * 12, home=str(home)).root.kind == "rsp"
    with pytest.raises(InputError, match="123456"):
        trace("123456", home=str(home))


def test_a_promotion_leads_through_its_result_to_the_model(home: Path):
    frames = trace(str(home / "datasets/frames"), home=str(home)).root.id
    result = {"model_digest": "e" * 64, "data_digest": frames, "inputs": []}
    put(home / "results/r/result.json", result)
    # The digest of a result is that of its content, however the file is laid out.
    content = json.dumps(result, sort_keys=True, separators=(",", ":")).encode()
    record = home / "promotions/encoder-v1.json"
    put(record, {"id": "c" * 64, "inputs": [hashlib.sha256(content).hexdigest()]})
    lineage = trace(str(record), home=str(home))
    assert [node.kind for node in lineage.nodes[:4]] == ["promotion", "evaluation", "rsp", "data set"]
    assert (len(lineage.sources), lineage.missing) == (7, ())


def test_a_missing_record_is_no_source_video(home: Path):
    (home / "runs/a/export/export.json").unlink()
    lineage = trace(str(home / "runs/b/export"), home=str(home))
    assert [node.id for node in lineage.missing] == ["e" * 64]
    assert len(lineage.sources) == 2


def test_records_that_name_one_another_end(tmp_path: Path):
    put(tmp_path / "a/export.json", {"id": "a" * 64, "kind": "rsp", "inputs": ["b" * 64]})
    put(tmp_path / "b/export.json", {"id": "b" * 64, "kind": "rsp", "inputs": ["a" * 64]})
    lineage = trace("a" * 64, home=str(tmp_path))
    assert len(lineage.nodes) == 2
    assert "drawn above" in lineage.text()
