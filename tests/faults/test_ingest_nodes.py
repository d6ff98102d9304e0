"""A cluster of several nodes: the same command uses them all, and one that is gone in the middle loses nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.processes import wait_for
from ingest import job
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import make_video

PROJECT = Path(__file__).parents[2]
NUM_SHARDS = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(6):
        make_video(folder / f"clip-{number}.mp4", frames=240 + number, size="480x360", fps=10)
    for number in range(6, NUM_SHARDS):
        (folder / f"clip-{number}.mp4").write_bytes((folder / f"clip-{number % 6}.mp4").read_bytes() + b"\0" * number)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head without CPUs and two nodes with one each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()


def config_of(corpus: Path, output: Path, workers: int | None) -> IngestConfig:
    recipe = Recipe(short_side=192, shard_bytes=1_000_000, max_failure_share=0.5)
    return IngestConfig(source=str(corpus), output=str(output), name="nodes", recipe=recipe, workers=workers)


def start(config: IngestConfig, folder: Path, address: str) -> subprocess.Popen[str]:
    config.save(folder / "config.json")
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    argv = [sys.executable, "-m", "ingest.main", str(folder / "config.json")]
    return subprocess.Popen(argv, env=variables, stderr=subprocess.PIPE, text=True)


def nodes_used(output: Path) -> list[str]:
    return [json.loads(path.read_bytes())["node"] for path in output.glob("shard-*.log.json")]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_node_removed_in_the_middle_loses_nothing(corpus, cluster, tmp_path):
    undisturbed = job.run(config_of(corpus, tmp_path / "alone", workers=0))
    assert len(undisturbed.receipts) >= NUM_SHARDS and undisturbed.num_failures == 1
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    child = start(config_of(corpus, tmp_path / "data", workers=None), tmp_path, cluster.address)
    try:
        both = wait_for(lambda: len(set(nodes_used(tmp_path / "data"))) == 2, timeout_s=120)
        assert both, child.communicate(timeout=5)[1] if child.poll() is not None else "still running"
        done = len(nodes_used(tmp_path / "data"))
        assert done < NUM_SHARDS - 4, "too quick to prove anything"
        cluster.remove_node(second, allow_graceful=False)
        started = time.monotonic()
        errors = child.communicate(timeout=180)[1]
    finally:
        child.kill()
    assert child.returncode == 0, errors
    assert time.monotonic() - started < 180
    for name in ("manifest.json", "plan.json"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert verify(str(tmp_path / "data")) == []
    assert nodes_used(tmp_path / "data").count(first.node_id) > NUM_SHARDS / 2
