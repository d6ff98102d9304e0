"""Other people's readers give the samples that ours gives: plain tar, webdataset, Ray Data."""

import subprocess
from pathlib import Path

import pytest
import webdataset

from ingest import job
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from ingest.shard import iter_members
from tests.helpers_media import make_corpus

Samples = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module", params=["frames", "video"])
def data_set(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_corpus(folder / "corpus")
    recipe = Recipe(layout=request.param, short_side=48, shard_bytes=60_000 if request.param == "frames" else 6000)
    config = IngestConfig(
        source=str(folder / "corpus"), output=str(folder / "data"), name="test", recipe=recipe, workers=0
    )
    job.run(config)
    return folder / "data"


@pytest.fixture
def samples(data_set) -> Samples:
    """{key: {suffix: bytes}} as our own strict reader of tars gives them."""
    found: Samples = {}
    for tar in shards(data_set):
        for member in iter_members(tar):
            found.setdefault(member.key, {})[member.suffix] = member.data
    assert len(found) == len(ShardDataset(str(data_set))) == 6
    return found


def shards(data_set: Path) -> list[Path]:
    tars = sorted(data_set.glob("shard-*.tar"))
    assert len(tars) > 1
    return tars


def test_plain_tar(data_set, samples, tmp_path):
    """The tar program, which knows nothing of samples: every member under its name, with its bytes."""
    found: dict[str, bytes] = {}
    for tar in shards(data_set):
        subprocess.run(["tar", "--extract", "--file", tar, "--directory", tmp_path], check=True, timeout=60)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {f"{key}.{suffix}": data for key, members in samples.items() for suffix, data in members.items()}


def test_webdataset(data_set, samples):
    urls = [str(tar) for tar in shards(data_set)]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert {sample["__key__"]: members_of(sample) for sample in seen} == samples


@pytest.mark.ray
def test_ray_data(data_set, samples, ray_cluster):
    import ray.data

    rows = ray.data.read_webdataset([str(tar) for tar in shards(data_set)], decoder=None).take_all()
    assert {row["__key__"]: members_of(row) for row in rows} == samples


def members_of(sample: dict) -> dict[str, bytes]:
    return {key: value for key, value in sample.items() if not key.startswith("__") and value is not None}
