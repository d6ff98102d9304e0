"""Feature caches: what is in them, what they are of, and that a killed build ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, DataError, InputError
from ingest.reader import ShardDataset
from tests.helpers_data import make_episode_dataset
from tests.helpers_models import export_rsp, perturbed
from tests.helpers_tvp import tiny_model
from training.export import save_video_export
from training.feature_cache import FeatureCache, FeatureCacheConfig
from training.feature_cache_build import plan, run
from training.providers import build_provider, parse_provider

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    data = make_episode_dataset(folder / "data", num_episodes=4, num_frames=7, size=32)
    export_rsp(folder / "encoder", perturbed())
    save_video_export(folder / "video", tiny_model(), card="A test.", inputs=["data"])
    return {"data": data, "encoder": str(folder / "encoder"), "video": str(folder / "video"), "folder": str(folder)}


def config_of(parts: dict[str, str], output: object, *, video: bool = False, **changes: object) -> FeatureCacheConfig:
    kind = (
        {"kind": "tvp", "url": parts["video"], "autocast": False}
        if video
        else {"kind": "encoder", "url": parts["encoder"]}
    )
    wanted = {
        "data": parts["data"],
        "provider": parse_provider(kind),
        "workers": 0,
        "dtype": "float32",
        "batch_frames": 4,
    }
    return FeatureCacheConfig(**(wanted | changes), output=str(output))


@pytest.fixture(scope="module")
def cache(parts) -> FeatureCache:
    """Every second frame, two noise draws of the video model."""
    config = config_of(parts, Path(parts["folder"]) / "cache", video=True, every=2, num_draws=2)
    summary = run(config)
    assert summary["num_frames"] == 4 * 4  # frames 0, 2, 4, 6
    return FeatureCache(config.output)


def test_each_kept_frame_holds_what_the_provider_says_for_each_draw(parts, cache):
    dataset = ShardDataset(parts["data"])
    provider = build_provider(parse_provider({"kind": "tvp", "url": parts["video"], "autocast": False}))
    images, text = {"main": dataset.frames(2, [4])}, [dataset.text(2)]
    key = dataset.key(2)
    for draw in range(2):
        expected = provider.features(images, text, draw=draw)
        torch.testing.assert_close(cache.features(key, [4], draw), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cache.features(key, [4], 0), cache.features(key, [4], 1), atol=1e-2)


def test_preloading_changes_nothing_but_the_time(cache):
    key = next(iter(cache._index()))
    loaded = FeatureCache(cache.url)
    loaded.preload()
    assert torch.equal(loaded.features(key, [6, 0], 1), cache.features(key, [6, 0], 1))


def test_frames_and_draws_that_are_not_there_are_named(cache):
    key = next(iter(cache._index()))
    with pytest.raises(InputError, match=r"frame 3 of .* is not cached, only every 2th of 7"):
        cache.features(key, [3])
    with pytest.raises(InputError, match="frame 8"):
        cache.features(key, [8])
    with pytest.raises(InputError, match="holds 2 noise draws, not number 2"):
        cache.features(key, [0], 2)
    with pytest.raises(DataError, match="holds no sample nobody"):
        cache.features("nobody", [0])


def test_a_cache_says_what_it_is_of(parts, cache):
    cache.require(data_version=cache.manifest.data_version, provider_digest=cache.manifest.provider_digest)
    with pytest.raises(InputError, match="is of provider"):
        cache.require(data_version=cache.manifest.data_version, provider_digest="0" * 64)
    with pytest.raises(InputError, match="is of data set"):
        cache.require(data_version="0" * 64, provider_digest=cache.manifest.provider_digest)
    with pytest.raises(DataError, match="already holds a feature cache with every 2, asked for is 3"):
        run(config_of(parts, cache.url, video=True, every=3, num_draws=2))
    with pytest.raises(InputError, match="no complete feature cache"):
        FeatureCache(parts["data"] + "-none")
    with pytest.raises(InputError, match="is no feature cache"):
        FeatureCache(parts["data"])


def test_the_plan_tells_the_size_and_writes_nothing(parts, tmp_path):
    found = plan(config_of(parts, tmp_path / "cache", every=3, dtype="float16"))
    assert found["observations"] == 4 * 3
    assert found["bytes_per_observation"] == 2 * int(np.prod(found["feature_shape"]))
    assert found["bytes"] == 12 * found["bytes_per_observation"]
    assert not (tmp_path / "cache").exists()


def test_still_encoders_have_no_draws(parts, tmp_path):
    with pytest.raises(ConfigError, match="num_draws = 2: 'encoder' features are not drawn"):
        run(config_of(parts, tmp_path / "cache", num_draws=2))


def test_a_damaged_cache_is_noticed(parts, tmp_path):
    config = config_of(parts, tmp_path / "cache")
    run(config)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"feature_shape"', '"feature_shapes"'))
    with pytest.raises(DataError, match="is not a manifest"):
        FeatureCache(config.output)


def contents(folder: Path) -> dict[str, bytes]:
    hidden = (path for path in folder.iterdir() if not (path.name.startswith(".") or path.name.endswith(".log.json")))
    return {path.name: path.read_bytes() for path in hidden}


def test_a_build_killed_at_commit_points_in_turn_ends_with_the_same_bytes(parts, tmp_path):
    config = config_of(parts, tmp_path / "undisturbed")
    run(config)
    killed = config.model_copy(update={"output": str(tmp_path / "killed")})
    killed.save(tmp_path / "config.json")
    for point in ("cache.after_sample:2", "cache.after_receipt", "cache.before_manifest"):
        done = subprocess.run(
            [sys.executable, "-m", "training.main", str(tmp_path / "config.json")],
            env={**os.environ, "PYTHONPATH": str(PROJECT), "FOREFRAME_FAULT": point, "OMP_NUM_THREADS": "1"},
            capture_output=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, (point, done.stderr[-500:])
    run(killed)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.ray
def test_two_ray_actors_fill_the_same_cache(parts, ray_cluster, tmp_path):
    run(config_of(parts, tmp_path / "here"))
    run(config_of(parts, tmp_path / "there", workers=2))
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.ray
def test_an_actor_answers_with_the_cause(parts, ray_cluster, tmp_path):
    config = config_of(parts, tmp_path / "cache", workers=1)
    gone = config.provider.model_copy(update={"cameras": ("elsewhere",)})
    with pytest.raises(InputError, match="elsewhere"):
        run(config.model_copy(update={"provider": gone}))
