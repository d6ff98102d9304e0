"""RLDS: data sets that tensorflow_datasets itself wrote, copies of them with one thing wrong, and literal bytes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import InputError
from infra.media_pictures import join_pictures
from infra.storage import put_folder
from ingest.corpora import corpus_module, rlds
from ingest.corpora.rlds_features import control_rate
from ingest.corpora.tf_example import parse_example
from ingest.corpora.tfrecord import iterate_records, read_record
from ingest.schema import Clip, SourceVideo

RLDS = Path(__file__).parents[1] / "assets/rlds"
TRAIN = "dict_actions-train.tfrecord-00000-of-00001"
OFFSETS, CONTENTS = (0, 7084, 17031), (7068, 9931, 4617)  # of the three records in it
LENGTHS = (5, 7, 3)


def colour(episode: int, frame: int, camera: int) -> tuple[int, int, int]:
    """What write_rlds.py painted into the lower three quarters; the upper one has its complement."""
    return (40 + 60 * episode, 10 + 20 * frame, 30 + 90 * camera)


def camera_of(clip: Clip, name: str) -> SourceVideo:
    return next(video for video in clip.videos if video.camera == name)


def decoded(root: str, clip: Clip, name: str) -> list[np.ndarray]:
    frames = rlds.read_pictures(root, clip, camera_of(clip, name)).frames
    return [np.asarray(Image.open(io.BytesIO(data))) for data in frames if isinstance(data, bytes)]


@pytest.fixture
def actions(tmp_path: Path) -> Path:
    """A copy of the set with actions in parts, as one's own root."""
    return Path(shutil.copytree(RLDS / "dict_actions/0.1.0", tmp_path / "set"))


def test_several_sets_and_splits_below_a_root_are_listed() -> None:
    clips = corpus_module("rlds").list_clips(str(RLDS))
    assert [clip.source_id for clip in clips] == [
        "code_points/0.0.1/train-00000-of-00001/000000",
        *(f"dict_actions/0.1.0/train-00000-of-00001/00000{i}" for i in range(3)),
        "dict_actions/0.1.0/val-00000-of-00001/000000",
        *(f"tensor_actions/1.0.0/train-00000-of-00001/00000{i}" for i in range(2)),
    ]
    assert not any(clip.problem for clip in clips)
    assert [clip.declared_num_frames for clip in clips] == [2, *LENGTHS, 4, 6, 6]
    assert [clip.text for clip in clips[:2]] == ["push the blue cube", "push block 0 über die Linie"]
    assert clips[4].metadata["source_split"] == "val" and clips[4].label == "dict_actions"
    assert clips[2].metadata["episode_metadata"] == {"file_path": "lab/train-1.h5", "success": 0, "seed": -1}


def test_colour_cameras_are_taken_and_the_others_named(actions: Path) -> None:
    clip = rlds.list_clips(str(actions))[1]
    assert [(video.camera, video.pictures) for video in clip.videos] == [("hand-image", True), ("image", True)]
    assert clip.trajectory == f"{TRAIN}#7084+9931"
    assert camera_of(clip, "image").path == f"{TRAIN}#7084+9931:steps/observation/image"
    assert clip.metadata["left_out"] == [
        "steps/action/terminate", "steps/observation/depth", "steps/observation/grey",
    ]  # fmt: skip


def test_every_frame_is_the_episodes_own(actions: Path) -> None:
    for episode, clip in enumerate(rlds.list_clips(str(actions))[:3]):
        exact, lossy = decoded(str(actions), clip, "hand-image"), decoded(str(actions), clip, "image")
        assert len(exact) == len(lossy) == LENGTHS[episode]
        for number, (png, jpeg) in enumerate(zip(exact, lossy, strict=True)):
            assert png.shape == jpeg.shape == (48, 64, 3)
            assert (png[12:] == colour(episode, number, 1)).all()
            assert (png[:12] == 255 - np.array(colour(episode, number, 1))).all()
            assert np.abs(jpeg[30:].astype(int) - colour(episode, number, 0)).max() <= 4


def test_pictures_can_be_joined(actions: Path, tmp_path: Path) -> None:
    clip = rlds.list_clips(str(actions))[0]
    hashes = {
        name: join_pictures(rlds.read_pictures(str(actions), clip, camera_of(clip, name)), tmp_path / f"{name}.mov")
        for name in ("image", "hand-image")
    }
    assert len(set(hashes.values())) == 2


def test_actions_in_parts_are_joined_in_the_order_of_their_names(actions: Path) -> None:
    for episode, clip in enumerate(rlds.list_clips(str(actions))[:3]):
        assert clip.metadata["actions"] == {"action/gripper": 1, "action/world_vector": 3}
        assert clip.metadata["proprioception"] == {"observation/state": 3}
        # The metadata have been through JSON by the time they are read.
        again = Clip.model_validate_json(clip.model_dump_json())
        arrays = rlds.read_trajectory(str(actions), again)
        frames = np.arange(LENGTHS[episode])
        expected = np.stack([frames % 2, frames, np.full_like(frames, 0) + 0.5, -frames], 1)
        np.testing.assert_array_equal(arrays["actions"], expected)
        np.testing.assert_array_equal(arrays["proprioception"][:, 0], episode)
        assert arrays["actions"].dtype == arrays["proprioception"].dtype == np.float32


def test_an_action_tensor_and_a_state_of_two_dimensions() -> None:
    root = str(RLDS / "tensor_actions/1.0.0")
    _, clip = rlds.list_clips(root)
    arrays = rlds.read_trajectory(root, clip)
    assert clip.text == "open drawer 1" and [video.camera for video in clip.videos] == ["main"]
    assert arrays["actions"].shape == (6, 7) and (arrays["actions"][:, 6] == 1).all()
    np.testing.assert_allclose(arrays["proprioception"][3], [1, 3, 0.25, 1e-3])


def test_actions_packed_into_bytes_are_left_out_and_named() -> None:
    (clip,) = rlds.list_clips(str(RLDS / "code_points"))
    assert clip.metadata["left_out"] == ["steps/action"] and not clip.trajectory


def test_rates_are_published_ones_or_said_to_be_assumed(actions: Path) -> None:
    place = actions / "dataset_info.json"
    info = json.loads(place.read_text())
    for name, expected in (("dict_actions", (10, "assumed")), ("bridge_dataset", (5, "published control rate"))):
        place.write_text(json.dumps(info | {"name": name}))
        clip = rlds.list_clips(str(actions))[0]
        assert (clip.metadata["fps"], clip.metadata["fps_source"]) == expected
        assert rlds.read_pictures(str(actions), clip, clip.videos[0]).fps == expected[0]
    assert control_rate("austin_buds_dataset_converted_externally_to_rlds") == (20, "published control rate")


def test_without_dataset_info_the_name_is_that_of_the_files(actions: Path) -> None:
    (actions / "dataset_info.json").unlink()
    assert {clip.label for clip in rlds.list_clips(str(actions))} == {"dict_actions"}


def spoil(place: Path, at: int) -> None:
    data = bytearray(place.read_bytes())
    data[at] ^= 0x40
    place.write_bytes(data)


def test_a_damaged_record_costs_its_episode_alone(actions: Path) -> None:
    before = rlds.list_clips(str(actions))
    spoil(actions / TRAIN, OFFSETS[1] + 5000)
    after = rlds.list_clips(str(actions))
    assert [clip for clip in after if not clip.problem] == [before[0], *before[2:]]
    assert after[1].source_id == before[1].source_id and not after[1].videos
    assert "checksum" in after[1].problem
    # Planned before, read after it was damaged:
    with pytest.raises(InputError, match="checksum"):
        rlds.read_trajectory(str(actions), before[1])
    with pytest.raises(InputError, match="checksum"):
        list(rlds.read_pictures(str(actions), before[1], before[1].videos[0]).frames)


def test_a_damaged_length_costs_the_rest_of_the_file(actions: Path) -> None:
    before = rlds.list_clips(str(actions))
    spoil(actions / TRAIN, OFFSETS[1])
    good, broken, rest, val = rlds.list_clips(str(actions))
    assert (good, val) == (before[0], before[3])
    assert "length is damaged" in broken.problem
    assert rest.source_id.endswith("/000002-rest") and "2 records, dataset_info.json says 3" in rest.problem
    with pytest.raises(InputError, match="no record of that length begins there"):
        rlds.read_trajectory(str(actions), before[1])


@pytest.mark.parametrize(("size", "num_good", "words"), [
    (OFFSETS[1] + 3000, 1, "the file is cut: the record has 2984 of the 9931 bytes"),
    (OFFSETS[2] + CONTENTS[2] + 15, 2, "the file is cut: the record has 4616 of the 4617 bytes"),
    (OFFSETS[1] + 7, 1, "ends 7 bytes into a record"),
    (OFFSETS[1], 1, "has 1 records, dataset_info.json says 3"),
    (0, 0, "has 0 records"),
])  # fmt: skip
def test_a_cut_file_keeps_its_whole_episodes(actions: Path, size: int, num_good: int, words: str) -> None:
    before = rlds.list_clips(str(actions))
    (actions / TRAIN).write_bytes((actions / TRAIN).read_bytes()[:size])
    clips = [clip for clip in rlds.list_clips(str(actions)) if clip.metadata.get("source_split") != "val"]
    assert [clip for clip in clips if not clip.problem] == before[:num_good]
    assert words in clips[num_good].problem
    with pytest.raises(InputError, match="the file is shorter"):
        rlds.read_trajectory(str(actions), before[2])


# A length of 2**40 and of 2**64 - 1 with the right checksums.
@pytest.mark.parametrize("header", ["0000000000010000aa3d6be4", "ffffffffffffffffa67b113a"])
def test_a_record_that_claims_a_huge_length_is_not_believed(tmp_path: Path, header: str) -> None:
    place = tmp_path / "a"
    place.write_bytes(bytes.fromhex(header) + bytes(100))
    (record,) = iterate_records(str(place))
    assert record.problem.startswith("the file is cut") and not record.content
    with pytest.raises(InputError, match=r"no address|the file is shorter"):
        read_record(str(tmp_path), f"a#0+{int.from_bytes(bytes.fromhex(header)[:8], 'little')}")


@pytest.mark.parametrize("address", ["a", "a#1", "a#-1+3", "#0+3", "a#0+99999999999"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(InputError, match="no address"):
        read_record(str(tmp_path), address)


def test_files_that_are_missing_are_one_clip_a_split(actions: Path) -> None:
    (actions / TRAIN).rename(actions / "dict_actions-train.tfrecord-00001-of-00004")
    clips = rlds.list_clips(str(actions))
    missing = next(clip for clip in clips if clip.source_id == "train-missing")
    assert missing.problem == "3 of 4 files of train are missing, the first is number 00000"
    assert clips[0].source_id == "train-00001-of-00004/000000" and not clips[0].problem


@pytest.mark.parametrize(("content", "words"), [
    ("0a", "ends inside a number"),
    ("0aff", "ends inside a number"),
    ("0a" + "ff" * 10 + "01", "more than 64 bits"),
    ("0a" + "ff" * 9 + "7f", "more than 64 bits"),
    ("0aff7f00", "16383 bytes are due where 1 are left"),
    ("0a" + "ff" * 9 + "01", "bytes are due where 0 are left"),
    ("0b", "field 1 of type 3"),
    ("0801", "field 1 of type 0"),
    ("1200", "field 2 of type 2"),
    ("0a0c0a0a0a01611205120301", "bytes are due where"),
    # {"a": FloatList of 3 bytes}; {"a": three lists}; "a" twice; a name that is no UTF-8
    ("0a0e0a0c0a0161120712050a03010203", "3 bytes of floats"),
    ("0a0d0a0b0a0161120612000a001200", "3 lists of values"),
    ("0a0e0a050a016112000a050a01611200", "twice"),
    ("0a070a050a01ff1200", "not UTF-8"),
])  # fmt: skip
def test_malformed_messages_are_one_line(content: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        for feature in parse_example(bytes.fromhex(content)).values():
            feature.floats()
    assert "\n" not in str(caught.value)


def test_values_packed_or_not_are_the_same() -> None:
    # 3 and -1, packed and one by one; 0.5 and -2 likewise: both are ways to write these lists.
    integers = [f"0a{len(bytes.fromhex(values)):02x}{values}" for values in ("03" + "ff" * 9 + "01",)]
    for body in (integers[0], "0803" + "08" + "ff" * 9 + "01"):
        feature = parse_example(entry("1a", body))["a"]
        assert feature.integers() == [3, -1] and feature.integers(1) == [3]
        with pytest.raises(InputError, match="holds integers, not floats"):
            feature.floats()
    for body in ("0a080000003f000000c0", "0d0000003f0d000000c0"):
        assert parse_example(entry("12", body))["a"].floats().tolist() == [0.5, -2]


def entry(kind: str, body: str) -> bytes:
    """The message of {"a": a list of that kind}, every length below 128."""
    inner = bytes.fromhex(kind) + bytes([len(body) // 2]) + bytes.fromhex(body)
    named = b"\x0a\x01a\x12" + bytes([len(inner)]) + inner
    features = b"\x0a" + bytes([len(named)]) + named
    return b"\x0a" + bytes([len(features)]) + features


@given(st.binary(max_size=60))
def test_no_bytes_do_anything_but_read_or_be_refused(content: bytes) -> None:
    try:
        for feature in parse_example(content).values():
            _ = feature.bytes_list() if feature.kind == "bytes" else feature.floats()
    except InputError as error:
        assert "\n" not in error.message.replace(repr("\n"), "")


@given(st.integers(0, CONTENTS[2] - 1), st.integers(0, 255))
def test_a_record_with_one_other_byte_is_read_or_refused(place: int, value: int) -> None:
    """The checksum is not what keeps the reader safe."""
    data = bytearray((RLDS / "dict_actions/0.1.0" / TRAIN).read_bytes()[OFFSETS[2] + 12 : -4])
    assert len(data) == CONTENTS[2]
    data[place] = value
    try:
        for feature in parse_example(bytes(data)).values():
            if feature.kind == "bytes":
                feature.bytes_list()
            elif feature.kind == "integers":
                feature.integers()
            else:
                feature.floats()
    except InputError:
        pass


def edit_features(root: Path, change: object) -> None:
    place = root / "features.json"
    features = json.loads(place.read_text())
    change(features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"])
    place.write_text(json.dumps(features))


def test_a_record_that_is_not_as_described_is_a_problem(actions: Path) -> None:
    def other_camera(steps: dict) -> None:
        parts = steps["observation"]["featuresDict"]["features"]
        parts["far"] = parts["image"]

    edit_features(actions, other_camera)
    assert {clip.problem for clip in rlds.list_clips(str(actions))} == {
        "the record has no feature 'steps/observation/far'"
    }


def test_other_sizes_than_described_are_refused(actions: Path) -> None:
    def wider(steps: dict) -> None:
        parts = steps["action"]["featuresDict"]["features"]
        parts["world_vector"]["tensor"]["shape"]["dimensions"] = ["4"]

    edit_features(actions, wider)
    clip = rlds.list_clips(str(actions))[0]
    with pytest.raises(InputError, match="'steps/action/world_vector' has 15 values where 5 steps of 4 are due"):
        rlds.read_trajectory(str(actions), clip)


@pytest.mark.parametrize(("features", "words"), [
    (None, "holds no features.json. Expected [NAME/VERSION/]features.json"),
    ("[]", "is no JSON object"),
    ('{"\\ud800": 1}', "is no JSON object"),
    ("{}", "is no description of features"),
    ('{"type": "FeaturesDict", "content": {}}', "old releases cannot be read"),
    ('{"featuresDict": {"features": {"label": {}}}}', "has no feature 'steps'"),
    ("{", "is no JSON object"),
])  # fmt: skip
def test_a_wrong_layout_names_what_is_expected(actions: Path, features: str | None, words: str) -> None:
    (actions / "features.json").unlink()
    if features is not None:
        (actions / "features.json").write_text(features)
    with pytest.raises(InputError) as caught:
        rlds.list_clips(str(actions))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_features_without_files_are_no_data_set(actions: Path) -> None:
    for place in actions.glob("*.tfrecord*"):
        place.unlink()
    with pytest.raises(InputError, match="holds no TFRecord file"):
        rlds.list_clips(str(actions))


def test_records_longer_than_the_window_are_read(actions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(iterate_records(str(actions / TRAIN)))
    assert [(record.offset, record.length) for record in expected] == list(zip(OFFSETS, CONTENTS, strict=True))
    monkeypatch.setattr("ingest.corpora.tfrecord.WINDOW_BYTES", 13)
    assert list(iterate_records(str(actions / TRAIN))) == expected


@pytest.mark.s3
def test_a_data_set_on_s3_reads_like_a_local_one(moto_s3: str) -> None:
    put_folder(RLDS, f"{moto_s3}/rlds")
    remote = f"{moto_s3}/rlds"
    clips = rlds.list_clips(remote)
    assert clips == rlds.list_clips(str(RLDS))
    np.testing.assert_array_equal(decoded(remote, clips[2], "image"), decoded(str(RLDS), clips[2], "image"))
    assert rlds.read_trajectory(remote, clips[2])["actions"].shape == (7, 4)
