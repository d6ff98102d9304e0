"""Killed at any of its commit points and run again, a latent cache is that of an undisturbed run, to the last byte."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers_cache import config_of, make_two_cameras, make_vae
from training.cache import LatentCache
from training.cache_build import plan, run

PROJECT = Path(__file__).parents[2]
POINTS = [
    "cache.after_sample:2",
    "cache.before_tar",
    "cache.after_tar",
    "cache.after_idx",
    "cache.after_receipt",
    "cache.before_tar:2",
    "cache.before_manifest",
    "cache.after_manifest",
]
# One process imports the libraries, then each point has a child of its own.
DRIVER = """
import os, sys
from pathlib import Path
from training.cache import CacheConfig
from training.cache_build import plan, run
from training.models.common.text import TokenEncoder

config = CacheConfig.load(Path(sys.argv[1]))
plan(config)
TokenEncoder(config.text).encode(["all libraries are imported now"])
for number, point in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        os.environ["FOREFRAME_FAULT"] = point
        run(config.model_copy(update={"output": f"{config.output}-{number}"}))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(config, content of an undisturbed run); outputs `cache-0` and so on are those of the killed runs."""
    folder = tmp_path_factory.mktemp("killed")
    data, vae = make_two_cameras(folder / "data", num_clips=3, num_frames=4), make_vae(folder / "vae")
    config = config_of(data, vae, folder / "cache")
    run(config)
    config.save(folder / "config.json")
    argv = [sys.executable, "-c", DRIVER, str(folder / "config.json"), *POINTS]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    driver = subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert driver.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS), driver.stderr
    return config, content(folder / "cache")


def content(output: Path) -> dict[str, bytes]:
    """Everything but the logs; a kill within a write may leave a temporary name, which nothing reads."""
    names = (path for path in output.iterdir() if not (path.name.startswith(".") and path.name.endswith(".part")))
    return {path.name: path.read_bytes() for path in names if not path.name.endswith(".log.json")}


@pytest.mark.parametrize("number", range(len(POINTS)), ids=POINTS)
def test_killed_there_and_run_again(killed, number):
    undisturbed = killed[1]
    config = killed[0].model_copy(update={"output": f"{killed[0].output}-{number}"})
    output, point = Path(config.output), POINTS[number]
    assert (output / "manifest.json").exists() == (point == "cache.after_manifest")
    committed = {
        "cache.after_receipt": 1,
        "cache.before_tar:2": 1,
        "cache.before_manifest": 2,
        "cache.after_manifest": 2,
    }
    assert plan(config)["shards_committed"] == committed.get(point, 0)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.receipt.json")}
    summary = run(config)
    assert content(output) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # committed work is not done again
    assert LatentCache(config.output).version == summary["version"]
