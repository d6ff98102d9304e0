"""Robot data sets of other formats, written by the libraries that define them, all the way into shards.

Every picture in them has a colour that tells its episode, frame and camera, so that no stored frame can be another's.
"""

from pathlib import Path

import numpy as np
import pytest

from infra.storage import join, put_folder
from ingest import job
from ingest.reader import ShardDataset, load_manifest
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify

ASSETS = Path(__file__).parents[1] / "assets"
LEROBOT = {"front": 0, "wrist": 1, "image": 2}
LENGTHS = {"lerobot": (8, 12, 9), "rlds": (5, 7, 3)}


def ingest(corpus: str, source: str, output: str, **recipe) -> ShardDataset:
    made = Recipe(short_side=None, jpeg_quality=95, shard_bytes=20_000, **recipe)
    config = IngestConfig(corpus=corpus, source=source, output=output, name="formats", recipe=made, workers=0)
    manifest = job.run(config)
    assert manifest.num_failures == 0 and verify(output) == []
    return ShardDataset(output)


def by_source(data: ShardDataset) -> dict[str, int]:
    return {data.record(index).source_id: index for index in range(len(data))}


@pytest.mark.parametrize("layout", ["frames", "video"])
@pytest.mark.parametrize("version", ["lerobot_v3", "lerobot_v21"])
def test_lerobot_episodes_keep_their_own_frames_actions_and_words(tmp_path, version, layout):
    data = ingest("lerobot", str(ASSETS / version), str(tmp_path / "data"), layout=layout)
    places = by_source(data)
    for episode, length in enumerate(LENGTHS["lerobot"]):
        index = places[f"episode-{episode:06d}"]
        assert set(data.record(index).cameras) == set(LEROBOT)
        for camera, number in LEROBOT.items():
            shown = data.frames(index, range(length), camera).mean(axis=(1, 2))
            painted = [(40 + 70 * episode, 20 + 18 * frame, 30 + 90 * number) for frame in range(length)]
            assert np.abs(shown - painted).max() < 8, (episode, camera)  # neighbours differ by 18
        arrays = data.arrays(index)
        assert len(arrays["actions"]) == len(arrays["proprioception"]) == length
    assert data.text(places["episode-000001"]) == "open the drawer"


def test_a_shared_file_is_one_input_and_no_duplicate(tmp_path):
    ingest("lerobot", str(ASSETS / "lerobot_v3"), str(tmp_path / "data"), layout="video")
    manifest = load_manifest(str(tmp_path / "data"))[0]
    episodes_and_cameras = 3 * len(LEROBOT)
    assert len(manifest.inputs) < episodes_and_cameras and manifest.num_samples == 3


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_rlds_episodes_keep_their_own_frames_and_actions(tmp_path, layout):
    source = str(ASSETS / "rlds/dict_actions/0.1.0")
    data = ingest("rlds", source, str(tmp_path / "data"), layout=layout, split_by="source")
    places = by_source(data)
    for episode, length in enumerate(LENGTHS["rlds"]):
        index = places[f"train-00000-of-00001/{episode:06d}"]
        for number, camera in enumerate(sorted(data.record(index).cameras)):
            pictures = data.frames(index, range(length), camera)
            height = pictures.shape[1]
            shown = pictures[:, height // 2 :].mean(axis=(1, 2))
            steps = np.diff(shown[:, 1])
            assert np.allclose(steps, 20, atol=8) and np.allclose(shown[:, 0], 40 + 60 * episode, atol=8), number
        assert len(data.arrays(index)["actions"]) == length
    assert load_manifest(str(tmp_path / "data"))[0].statistics["split"] == {"train": 3, "validation": 1}


def calvin(root: Path) -> None:
    """Two annotated spans that overlap, as in play data."""
    folder = root / "training"
    (folder / "lang_annotations").mkdir(parents=True)
    for index in range(100, 130):
        np.savez_compressed(
            folder / f"episode_{index:07d}.npz",
            rgb_static=np.full((40, 40, 3), (5 * (index - 100), 60, 90), np.uint8),
            rgb_gripper=np.full((24, 24, 3), (60, 5 * (index - 100), 90), np.uint8),
            depth_static=np.zeros((40, 40), np.float32),
            actions=np.full(7, index / 1000),
            rel_actions=np.full(7, index / 1000),
            robot_obs=np.full(15, index / 500),
        )
    words = {"language": {"ann": ["lift it", "put it down"], "task": ["lift", "place"]}}
    record = np.array(words | {"info": {"indx": [(100, 119), (110, 129)]}}, dtype=object)
    np.save(folder / "lang_annotations/auto_lang_ann.npy", record, allow_pickle=True)


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_calvin_clips_keep_their_own_frames_and_actions(tmp_path, layout):
    calvin(tmp_path / "source")
    data = ingest("calvin", str(tmp_path / "source"), str(tmp_path / "data"), layout=layout, split_by="source")
    starts = {"lift it": 100, "put it down": 110}
    assert {data.text(index) for index in range(2)} == set(starts)
    for index in range(2):
        indices = np.arange(20) + starts[data.text(index)]
        for camera, channel in (("static", 0), ("gripper", 1)):
            shown = data.frames(index, range(20), camera).mean(axis=(1, 2))[:, channel]
            assert np.abs(shown - 5 * (indices - 100)).max() < 2.5
        assert np.allclose(data.arrays(index)["actions"][:, 0], indices / 1000, atol=1e-6)


@pytest.mark.s3
def test_shared_files_and_records_come_from_s3(tmp_path, moto_s3, monkeypatch):
    """The same manifest as from the disk; a file that several episodes share comes once for all of them."""
    from infra import storage

    fetched = []
    whole = storage.get_file

    def counting(url, local) -> None:
        fetched.append(str(url).rsplit("/", 1)[-1])
        whole(url, local)

    monkeypatch.setenv("FOREFRAME_CACHE_FOLDER", str(tmp_path / "cache"))
    for corpus, name in (("lerobot", "lerobot_v3"), ("rlds", "rlds")):
        put_folder(ASSETS / name, join(moto_s3, f"formats/{name}"))
        ingest(corpus, str(ASSETS / name), str(tmp_path / name))
        monkeypatch.setattr("ingest.cache.get_file", counting)
        ingest(corpus, join(moto_s3, f"formats/{name}"), join(moto_s3, f"formats/{name}-data"))
        there = storage.read_bytes(join(moto_s3, f"formats/{name}-data/manifest.json"))
        assert there == (tmp_path / name / "manifest.json").read_bytes()
    videos = [name for name in fetched if name.endswith(".mp4")]
    assert 0 < len(videos) <= 4  # two cameras of two files
