"""LeRobotDataset: data sets that lerobot itself wrote, and copies of them with one thing wrong."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from infra.errors import InputError
from infra.media import scan
from infra.media_decode import decode_video
from infra.storage import put_folder, write_bytes
from ingest.corpora import corpus_module, lerobot
from ingest.corpora.cameras import camera_names
from ingest.schema import Clip, SourceVideo

ASSETS = Path(__file__).parents[1] / "assets"
V3, V21 = str(ASSETS / "lerobot_v3"), str(ASSETS / "lerobot_v21")
LENGTHS = (8, 12, 9)
CAMERA_NUMBERS = {"front": 0, "wrist": 1, "image": 2}


def colour(episode: int, frame: int, camera: str) -> tuple[int, int, int]:
    """What write_lerobot.py painted."""
    return (40 + 70 * episode, 20 + 18 * frame, 30 + 90 * CAMERA_NUMBERS[camera])


def camera_of(clip: Clip, name: str) -> SourceVideo:
    return next(video for video in clip.videos if video.camera == name)


@pytest.fixture(params=["lerobot_v3", "lerobot_v21"])
def root(request: pytest.FixtureRequest) -> str:
    return str(ASSETS / request.param)


def changed(tmp_path: Path, source: str, **changes: object) -> str:
    """A copy whose info.json has other values."""
    target = tmp_path / "copy"
    shutil.copytree(source, target)
    place = target / "meta/info.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    return str(target)


def edit_table(root: str, name: str, **columns: list[object]) -> None:
    """Write columns of a Parquet file anew."""
    table = pyarrow.parquet.read_table(Path(root) / name)
    for key, values in columns.items():
        place = table.column_names.index(key)
        table = table.set_column(place, key, pyarrow.array(values))
    pyarrow.parquet.write_table(table, Path(root) / name)


def test_episodes_have_words_cameras_and_lengths(root: str) -> None:
    clips = corpus_module("lerobot").list_clips(root)
    assert [clip.source_id for clip in clips] == ["episode-000000", "episode-000001", "episode-000002"]
    assert [clip.text for clip in clips] == ["pick up the cube", "open the drawer", "pick up the cube"]
    assert [clip.label for clip in clips] == [clip.text for clip in clips]
    assert [clip.declared_num_frames for clip in clips] == list(LENGTHS)
    assert not any(clip.problem for clip in clips)
    for clip in clips:
        assert [(video.camera, video.pictures) for video in clip.videos] == [
            ("image", True), ("front", False), ("wrist", False),
        ]  # fmt: skip
        assert clip.metadata["source_split"] == "train" and clip.metadata["robot_type"] == "arm"
        assert "left_out" not in clip.metadata and "tasks" not in clip.metadata


def test_every_frame_of_a_shared_video_is_the_episodes_own() -> None:
    clips = lerobot.list_clips(V3)
    shared = [camera_of(clip, "front").path for clip in clips]
    assert shared[0] == shared[1] != shared[2]  # the writer began a new file
    for episode, clip in enumerate(clips):
        for camera in ("front", "wrist"):
            video = camera_of(clip, camera)
            times = scan(Path(V3) / video.path).timestamps_s
            assert video.start_s is not None and video.end_s is not None
            inside = [i for i, time in enumerate(times) if video.start_s - 0.01 <= time < video.end_s - 0.01]
            frames = decode_video(Path(V3) / video.path, inside)
            assert len(frames) == LENGTHS[episode]
            for number, frame in enumerate(frames):
                assert np.abs(frame[24, 32].astype(int) - colour(episode, number, camera)).max() <= 7


def test_a_video_of_its_own_is_taken_whole() -> None:
    for episode, clip in enumerate(lerobot.list_clips(V21)):
        video = camera_of(clip, "wrist")
        assert (video.start_s, video.end_s) == (None, None)
        frames = decode_video(Path(V21) / video.path)
        assert len(frames) == LENGTHS[episode]
        assert np.abs(frames[-1, 24, 32].astype(int) - colour(episode, LENGTHS[episode] - 1, "wrist")).max() <= 7


def test_pictures_in_the_table_are_exact(root: str) -> None:
    for episode, clip in enumerate(lerobot.list_clips(root)):
        pictures = lerobot.read_pictures(root, clip, camera_of(clip, "image"))
        frames = [np.asarray(Image.open(io.BytesIO(data))) for data in pictures.frames if isinstance(data, bytes)]
        assert pictures.fps == 10 and len(frames) == LENGTHS[episode]
        for number, frame in enumerate(frames):
            assert frame.shape == (48, 64, 3) and (frame == colour(episode, number, "image")).all()


def test_arrays_are_the_episodes_own(root: str) -> None:
    for episode, clip in enumerate(lerobot.list_clips(root)):
        arrays = lerobot.read_trajectory(root, clip)
        length = LENGTHS[episode]
        frames = np.arange(length)
        assert {name: values.dtype for name, values in arrays.items()} == dict.fromkeys(
            ("actions", "proprioception", "next_reward", "observation_force"), np.float32
        )
        np.testing.assert_array_equal(arrays["actions"], np.stack([frames, np.full(length, -episode)], 1))
        np.testing.assert_array_equal(arrays["proprioception"][:, 1], frames)
        np.testing.assert_array_equal(arrays["proprioception"][:, 0], episode)
        np.testing.assert_array_equal(arrays["next_reward"], frames == length - 1)
        assert arrays["observation_force"].shape == (length, 2, 2)
        np.testing.assert_array_equal(arrays["observation_force"][:, 0, 1], frames)


def test_rows_are_found_by_episode_not_by_place(tmp_path: Path) -> None:
    """from/to indices that are wrong in the same way as each other do not matter; rows of another episode would."""
    root = changed(tmp_path, V3)
    name = "data/chunk-000/file-000.parquet"
    table = pyarrow.parquet.read_table(Path(root) / name)
    order = [*range(20, 29), *range(20)]  # the last episode first, one row group
    pyarrow.parquet.write_table(table.take(order), Path(root) / name)
    for clip in lerobot.list_clips(root):
        before = lerobot.read_trajectory(V3, clip)
        for key, values in lerobot.read_trajectory(root, clip).items():
            np.testing.assert_array_equal(values, before[key])
        pictures, expected = (lerobot.read_pictures(at, clip, camera_of(clip, "image")) for at in (root, V3))
        assert list(pictures.frames) == list(expected.frames)


def test_rows_that_disagree_with_the_episode_are_refused(tmp_path: Path) -> None:
    root = changed(tmp_path, V3)
    clip = lerobot.list_clips(root)[1]
    name = "data/chunk-000/file-000.parquet"
    edit_table(root, name, episode_index=[0] * 9 + [1] * 11 + [2] * 9)
    with pytest.raises(InputError, match="frames of episode 1 are not numbered"):
        lerobot.read_trajectory(root, clip)
    with pytest.raises(InputError, match="frame 1 stands where 0 is due"):
        list(lerobot.read_pictures(root, clip, camera_of(clip, "image")).frames)
    edit_table(root, name, episode_index=[0] * 8 + [1] * 11 + [2] * 10)
    with pytest.raises(InputError, match="11 rows of episode-000001, the list of episodes says 12"):
        lerobot.read_trajectory(root, clip)


EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.mark.parametrize(("column", "values", "words"), [
    ("length", [8, 11, 9], "its rows 8 to 20 are 12, its length is 11"),
    ("videos/observation.images.front/to_timestamp", [0.8, 1.9, 0.9], "front has 0.8 s to 1.9 s, 11 frames"),
    ("videos/observation.images.wrist/from_timestamp", [0.0, -0.4, 0.0], "wrist has -0.4 s to 2 s"),
    ("videos/observation.images.wrist/to_timestamp", [0.8, float("nan"), 0.9], "no videos/observation.images.wrist/to"),
    ("data/file_index", [0, 7, 0], "data/chunk-000/file-007.parquet is missing"),
])  # fmt: skip
def test_lengths_that_disagree_are_that_episodes_problem(
    tmp_path: Path, column: str, values: list[object], words: str
) -> None:
    root = changed(tmp_path, V3)
    edit_table(root, EPISODES, **{column: values})
    first, wrong, last = lerobot.list_clips(root)
    assert words in wrong.problem and not wrong.trajectory
    assert not first.problem and not last.problem


def test_several_tasks_are_kept_and_the_first_is_the_text(tmp_path: Path) -> None:
    root = changed(tmp_path, V21)
    rows = [{"episode_index": 0, "tasks": ["lift", "put down"], "length": 8}, {"episode_index": 1, "length": 12}]
    (Path(root) / "meta/episodes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    both, none = lerobot.list_clips(root)
    assert (both.text, both.label, both.metadata["tasks"]) == ("lift", "lift", ["lift", "put down"])
    assert (none.text, none.label) == ("", "copy")


def test_depth_maps_and_grey_pictures_are_left_out_and_named(tmp_path: Path) -> None:
    features = json.loads((Path(V21) / "meta/info.json").read_text())["features"]
    features["observation.images.wrist"]["info"]["video.is_depth_map"] = True
    features["observation.image"]["shape"] = [48, 64, 1]
    clip = lerobot.list_clips(changed(tmp_path, V21, features=features))[0]
    assert [video.camera for video in clip.videos] == ["main"]  # the only one left
    assert clip.videos[0].path.endswith("observation.images.front/episode_000000.mp4")
    assert clip.metadata["left_out"] == ["observation.image", "observation.images.wrist"]


def test_an_optional_array_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    root = changed(tmp_path, V21)
    clip = lerobot.list_clips(root)[0]
    edit_table(root, clip.trajectory, **{"next.reward": [float("nan")] * 8})
    assert "next_reward" not in lerobot.read_trajectory(root, clip)
    edit_table(root, clip.trajectory, action=[[0.0, 1.0, 2.0]] * 8)
    with pytest.raises(InputError, match=r"'action' has the shape \(3,\) a frame, meta/info.json says \(2,\)"):
        lerobot.read_trajectory(root, clip)
    edit_table(root, clip.trajectory, action=[[0.0, 1.0], [2.0]] * 4)
    with pytest.raises(InputError, match="'action' is not a rectangular list"):
        lerobot.read_trajectory(root, clip)


@pytest.mark.parametrize("template", [
    "../outside/episode_{episode_index:06d}.mp4",
    "/etc/{video_key}.mp4",
    "videos/../../{video_key}.mp4",
    "videos/{video_key}#{episode_index}.mp4",
])  # fmt: skip
def test_a_template_that_leaves_the_data_set_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError, match="out of the data set") as caught:
        lerobot.list_clips(changed(tmp_path, V21, video_path=template))
    assert "\n" not in str(caught.value)


def test_a_feature_whose_name_leaves_the_data_set_is_refused(tmp_path: Path) -> None:
    features = json.loads((Path(V21) / "meta/info.json").read_text())["features"]
    features["../../.."] = features["observation.images.wrist"]
    with pytest.raises(InputError, match="out of the data set"):
        lerobot.list_clips(changed(tmp_path, V21, features=features))


@pytest.mark.parametrize(("template", "words"), [
    ("data/{episode_index.__class__}.parquet", "placeholder 'episode_index.__class__'"),
    ("data/{episode}.parquet", "placeholder 'episode'"),
    ("data/{}.parquet", "placeholder ''"),
    ("data/{episode_index!r}.parquet", "placeholder 'episode_index'"),
    ("data/{episode_index:0999999999d}.parquet", "formats 'episode_index' as '0999999999d'"),
    ("data/{episode_index:{video_key}}.parquet", "formats 'episode_index'"),
    ("data/{file_index}.parquet", "has 'file_index', which v2.1 lacks"),
    ("data/{episode_index.parquet", "is no template"),
    (None, "None is no template"),
])  # fmt: skip
def test_an_unknown_placeholder_is_refused(tmp_path: Path, template: str | None, words: str) -> None:
    with pytest.raises(InputError, match=r"meta/info\.json: data_path") as caught:
        lerobot.list_clips(changed(tmp_path, V21, data_path=template))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"codebase_version": "v1.6"}, "'v1.6'. Supported: v2.0, v2.1, v3.0"),
    ({"codebase_version": None}, "None. Supported"),
    ({"fps": 0}, "has the fps 0"),
    ({"fps": "fast"}, "has the fps 'fast'"),
    ({"features": ["action"]}, "has no features"),
    ({"chunks_size": 0}, "chunks_size 0"),
])  # fmt: skip
def test_what_info_cannot_say_is_one_line(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        lerobot.list_clips(changed(tmp_path, V3, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_version_2_0_is_read_like_2_1(tmp_path: Path) -> None:
    root = changed(tmp_path, V21, codebase_version="v2.0")
    (Path(root) / "meta/episodes_stats.jsonl").unlink()
    assert len(lerobot.read_trajectory(root, lerobot.list_clips(root)[2])["actions"]) == 9


def test_another_folder_names_the_file_expected(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(InputError, match=r"meta/info\.json does not exist") as caught:
        lerobot.list_clips(str(tmp_path))
    assert "\n" not in str(caught.value)
    for source, gone in ((V3, EPISODES), (V21, "meta/episodes.jsonl")):
        root = changed(tmp_path / gone.rsplit(".", 1)[1], source)
        (Path(root) / gone).unlink()
        with pytest.raises(InputError, match=f"holds no {gone}"):
            lerobot.list_clips(root)


@pytest.mark.parametrize(("line", "words"), [
    ("{", "line 2 is no JSON object"),
    ("[1]", "line 2 is no JSON object"),
    ('{"episode_index": 1, "length": 12, "tasks": ["\\ud800"]}', "line 2 is no JSON object"),
    ("[" * 100_000, "line 2 is no JSON object"),
    ('{"episode_index": true, "length": 3}', "index True"),
    ('{"episode_index": 1, "length": -3}', "length -3"),
    ('{"episode_index": 0, "length": 8}', "episode-000000 is listed twice"),
])  # fmt: skip
def test_a_wrong_list_of_episodes_is_named(tmp_path: Path, line: str, words: str) -> None:
    root = changed(tmp_path, V21)
    (Path(root) / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 8}\n' + line)
    with pytest.raises(InputError, match=words):
        lerobot.list_clips(root)


def test_broken_tables_are_named(tmp_path: Path) -> None:
    root = changed(tmp_path, V21)
    clips = lerobot.list_clips(root)
    place = Path(root) / clips[0].trajectory
    content = place.read_bytes()
    for broken in (b"PAR1", content[:-100], content[:4] + bytes(96) + content[100:]):
        place.write_bytes(broken)
        if len(broken) < len(content):  # the hole is in the pictures, which a trajectory does not need
            with pytest.raises(InputError, match="is no readable Parquet file"):
                lerobot.read_trajectory(root, clips[0])
        with pytest.raises(InputError, match="is no readable Parquet file"):
            list(lerobot.read_pictures(root, clips[0], camera_of(clips[0], "image")).frames)
    pyarrow.parquet.write_table(pyarrow.table({"episode_index": [0], "frame_index": [0]}), place)
    with pytest.raises(InputError, match="has no column 'action'"):
        lerobot.read_trajectory(root, clips[0])


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    root = changed(tmp_path, V21)
    clip = lerobot.list_clips(root)[0]
    image = camera_of(clip, "image")
    for cells, words in (
        ([{"bytes": b"x", "path": "a"}] * 7 + [{"bytes": None, "path": "b"}], "frame 7 has no bytes"),
        (["images/frame.png"] * 8, "holds string, no pictures"),
    ):
        edit_table(root, clip.trajectory, **{"observation.image": cells})
        with pytest.raises(InputError, match=words):
            list(lerobot.read_pictures(root, clip, image).frames)


def test_words_of_a_table_that_are_no_text_are_refused(tmp_path: Path) -> None:
    root = changed(tmp_path, V3)
    bytes_of_words = pyarrow.array([[b"\xff"]] * 3, pyarrow.list_(pyarrow.binary()))
    table = pyarrow.parquet.read_table(Path(root) / EPISODES)
    words = pyarrow.Array.from_buffers(
        pyarrow.list_(pyarrow.string()), 3, bytes_of_words.buffers()[:2],
        children=[pyarrow.Array.from_buffers(pyarrow.string(), 3, bytes_of_words.values.buffers())],
    )  # fmt: skip
    pyarrow.parquet.write_table(table.set_column(1, "tasks", words), Path(root) / EPISODES)
    with pytest.raises(InputError, match="is no readable Parquet file: UnicodeDecodeError"):
        lerobot.list_clips(root)


def test_cameras_have_short_names_each_once() -> None:
    prefixes = ("observation.images.", "observation.")
    assert camera_names(["observation.images.top"], prefixes) == {"observation.images.top": "main"}
    assert camera_names([], prefixes) == {}
    keys = ["observation.images.cam.left", "observation.images.top", "observation.top", "-.x", "_.x", "..."]
    assert camera_names(keys, prefixes) == {
        "observation.images.cam.left": "cam-left",
        "observation.images.top": "observation-images-top",
        "observation.top": "observation-top",
        "-.x": "x",
        "_.x": "x-2",
        "...": "unnamed",
    }


@pytest.mark.s3
def test_a_data_set_on_s3_reads_like_a_local_one(moto_s3: str) -> None:
    put_folder(Path(V3), f"{moto_s3}/lerobot")
    remote = f"{moto_s3}/lerobot"
    clips = lerobot.list_clips(remote)
    assert clips == lerobot.list_clips(V3)
    for key, values in lerobot.read_trajectory(remote, clips[2]).items():
        np.testing.assert_array_equal(values, lerobot.read_trajectory(V3, clips[2])[key])
    pictures, local = (lerobot.read_pictures(at, clips[2], camera_of(clips[2], "image")) for at in (remote, V3))
    assert list(pictures.frames) == list(local.frames)
    with pytest.raises(InputError, match=r"gone\.parquet does not exist"):
        lerobot.read_trajectory(remote, clips[0].model_copy(update={"trajectory": "data/gone.parquet"}))
    write_bytes(f"{remote}/{clips[0].trajectory}", b"PAR1 and no more PAR1")
    with pytest.raises(InputError, match="is no readable Parquet file"):
        lerobot.read_trajectory(remote, clips[0])


@pytest.mark.s3
def test_a_store_that_fails_by_range_is_read_whole(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_folder(Path(V21), f"{moto_s3}/lerobot")
    remote = f"{moto_s3}/lerobot"
    clip = lerobot.list_clips(remote)[0]

    def failing(url: str) -> tuple[object, str]:
        raise OSError(f"connection reset: {url}")

    monkeypatch.setattr("ingest.corpora.lerobot_tables.as_arrow", failing)
    assert len(lerobot.read_trajectory(remote, clip)["actions"]) == 8
    assert len(list(lerobot.read_pictures(remote, clip, camera_of(clip, "image")).frames)) == 8
    with pytest.raises(InputError, match="is no readable Parquet file"):
        lerobot.read_trajectory(V21, clip)  # a local disk has no second way
