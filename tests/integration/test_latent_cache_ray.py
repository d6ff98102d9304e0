"""Latent caches over Ray Data actors, on S3, and of published latents after a real ingest."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from infra.errors import InputError
from infra.storage import join, put_folder
from ingest import job
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from tests.helpers_cache import config_of, make_two_cameras, make_vae
from tests.helpers_media import make_video
from training.cache import LatentCache
from training.cache_build import run
from training.main import main
from training.models.common.text import TextEncoderConfig
from training.official_latents import OfficialLatentsConfig, import_official


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(data set, VAE export, cache filled in this process)."""
    folder = tmp_path_factory.mktemp("latents")
    data, vae = make_two_cameras(folder / "data", num_clips=6, num_frames=5), make_vae(folder / "vae")
    run(config_of(data, vae, folder / "cache"))
    return data, vae, folder / "cache"


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if not path.name.endswith(".log.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.ray
def test_two_actors_fill_the_same_cache(places, ray_cluster, tmp_path):
    data, vae, output = places
    summary = run(config_of(data, vae, tmp_path / "cache", workers=2))
    assert summary["version"] == LatentCache(str(output)).version
    assert hashes(tmp_path / "cache") == hashes(output)


@pytest.mark.ray
def test_an_actor_answers_with_the_cause(places, ray_cluster, tmp_path):
    """Not with a trace, and not by dying over and over."""
    data, vae, _ = places
    config = config_of(data, vae, tmp_path / "cache", workers=1, text=TextEncoderConfig(max_tokens=3))
    with pytest.raises(InputError, match="tokens where the model reads 3"):
        run(config)


@pytest.mark.s3
def test_everything_on_s3(places, moto_s3, tmp_path):
    data, vae, output = places
    remote = join(moto_s3, "latent-cache")
    put_folder(Path(data), join(remote, "data"), last="manifest.json")
    put_folder(Path(vae), join(remote, "vae"), last="export.json")
    config = config_of(join(remote, "data"), join(remote, "vae"), tmp_path)
    config = config.model_copy(update={"output": join(remote, "cache")})
    assert run(config)["version"] == LatentCache(str(output)).version
    near, far = LatentCache(str(output)), LatentCache(join(remote, "cache"))
    assert torch.equal(far.moments("clip-00005", "wrist", [7, 1]), near.moments("clip-00005", "wrist", [7, 1]))
    assert torch.equal(far.text_states("clip-00005"), near.text_states("clip-00005"))


def test_the_entry_point_plans_and_runs(places, tmp_path, capsys):
    data, vae, output = places
    config_of(data, vae, tmp_path / "cache").save(tmp_path / "config.json")
    assert main([str(tmp_path / "config.json"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 2 * sum(5 + number for number in range(6))
    assert not (tmp_path / "cache").exists()
    assert main([str(tmp_path / "config.json")]) == 0
    assert LatentCache(str(tmp_path / "cache")).version == LatentCache(str(output)).version


def test_published_latents_of_a_corpus_that_was_ingested(tmp_path):
    """Two data sets side by side, one with two cameras of which the annotation lists one."""
    root = tmp_path / "corpus"
    tensors = {}
    for dataset, name, cameras, listed in (("bridge", "7", ("rgb",), 1), ("xhand", "3", ("0", "1"), 1)):
        videos = [f"videos/val/{name}/{camera}.mp4" for camera in cameras]
        for video in videos:
            make_video(root / dataset / video, frames=6, size=f"{64 + 16 * len(cameras)}x64")
        latents = [f"latent_videos/val/{name}/{number}.pt" for number in range(listed)]
        record = {
            "texts": ["pour the juice"],
            "videos": [{"video_path": video} for video in videos[:listed]],
            "latent_videos": [{"latent_video_path": path} for path in latents],
            "video_length": 6,
        }
        annotation = root / dataset / f"annotation/val/{name}.json"
        annotation.parent.mkdir(parents=True)
        annotation.write_text(json.dumps(record))
        stored = root / dataset / latents[0].replace("latent_videos", "latent_videos_svd")
        stored.parent.mkdir(parents=True)
        tensors[dataset] = torch.randn(6, 4, 8, 8)
        torch.save(tensors[dataset], stored)
    recipe = Recipe(layout="video", short_side=32, max_failure_share=0.5)
    job.run(
        IngestConfig(
            corpus="annotated", source=str(root), output=str(tmp_path / "data"), name="x", recipe=recipe, workers=0
        )
    )
    config = OfficialLatentsConfig(
        data=str(tmp_path / "data"), corpus=str(root), image_size=64, output=str(tmp_path / "cache")
    )
    import_official(config)
    cache, data = LatentCache(str(tmp_path / "cache")), ShardDataset(str(tmp_path / "data"))
    assert len(cache) == len(data) == 2
    for index in range(2):
        key, dataset = data.key(index), data.record(index).label
        moments = cache.moments(key, None, range(6))
        torch.testing.assert_close(moments[:, 0] * 0.18215, tensors[dataset], atol=1e-6, rtol=1e-6)
    failures = [failure for receipt in cache.manifest.receipts for failure in receipt.failures]
    assert [(failure.source_id, failure.reason) for failure in failures] == [("xhand/val/3", "unreadable")]
