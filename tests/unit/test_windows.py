"""Which frames of which episodes are a clip, against indices written by hand and a slow list of everything."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import DataError, InputError
from ingest.windows import ClipSource, ClipWindows, WindowRule, labels_of, num_windows, window_frames
from tests.helpers_clips import Take, level, make_takes

LINSPACE = WindowRule(kind="linspace", max_source_frames=100, short="repeat")
EVERY_SECOND = WindowRule(num_frames=16, stride=2, start_every=2, short="repeat")
CLOTH = WindowRule(num_frames=4, stride=5, start_every=5)


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (24, (0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 23)),
        (16, tuple(range(16))),
        (31, tuple(range(0, 31, 2))),
        (100, (0, 6, 13, 19, 26, 33, 39, 46, 52, 59, 66, 72, 79, 85, 92, 99)),
        (5, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4)),
        (1, (0,) * 16),
    ],
)
def test_linspace_rounds_towards_zero(num_frames, expected):
    assert num_windows(LINSPACE, num_frames) == 1
    assert window_frames(LINSPACE, num_frames, 0) == expected


@pytest.mark.parametrize("num_frames", range(1, 101))
def test_linspace_is_numpys(num_frames):
    assert window_frames(LINSPACE, num_frames, 0) == tuple(np.linspace(0, num_frames - 1, 16).astype(int))


def test_windows_start_at_every_second_frame_and_stand_still_at_the_end():
    assert num_windows(EVERY_SECOND, 20) == 10
    assert window_frames(EVERY_SECOND, 20, 0) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19, 19, 19, 19, 19, 19)
    assert window_frames(EVERY_SECOND, 20, 7) == (14, 16, 18, *[19] * 13)
    assert window_frames(EVERY_SECOND, 20, 9) == (18, *[19] * 15)
    assert num_windows(EVERY_SECOND, 21) == 11
    assert window_frames(EVERY_SECOND, 21, 10) == (20,) * 16


def test_wide_strides():
    assert [window_frames(CLOTH, 12, window) for window in range(num_windows(CLOTH, 12))] == [
        (0, 5, 10, 11),
        (5, 10, 11, 11),
        (10, 11, 11, 11),
    ]


@given(st.integers(1, 60), st.integers(2, 9), st.integers(1, 6), st.integers(1, 6))
def test_windows_are_what_a_plain_loop_gives(num_frames, length, stride, start_every):
    rule = WindowRule(num_frames=length, stride=stride, start_every=start_every, short="repeat")
    expected = []
    for start in range(0, num_frames, start_every):
        clip = []
        while len(clip) < length:
            clip.append(min(start + stride * len(clip), num_frames - 1))
        expected.append(tuple(clip))
    assert [window_frames(rule, num_frames, window) for window in range(num_windows(rule, num_frames))] == expected


@pytest.mark.parametrize("kind", ["linspace", "windows"])
def test_episodes_outside_the_rule_give_no_window(kind):
    rule = WindowRule(kind=kind, num_frames=8, max_source_frames=20, short="drop")
    assert [num_windows(rule, length) > 0 for length in (0, 7, 8, 20, 21)] == [False, False, True, True, False]
    repeating = rule.model_copy(update={"short": "repeat"})
    assert [num_windows(repeating, length) > 0 for length in (0, 1, 7, 20, 21)] == [False, True, True, True, False]


@pytest.mark.parametrize("window", [-1, 10])
def test_a_window_that_does_not_exist_is_refused(window):
    with pytest.raises(InputError, match=f"window {window} "):
        window_frames(EVERY_SECOND, 20, window)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """Seven episodes of three labels; the fifth has two cameras of unequal length, the last is held out."""
    takes = [
        Take(9, "push", "push it"),
        Take(12, "pour", "pour it"),
        Take(5, "push", "push it again"),
        Take(40, "pour", "pour slowly"),
        Take(11, "fold", "fold it", cameras=("1", "0"), camera_frames={"0": 9}),
        Take(14, "pour", "pour once more"),
        Take(9, "push", "push unseen", split="validation"),
    ]
    return make_takes(tmp_path_factory.mktemp("windows") / "d", takes)


def source(url: str, *labels: str, **rule) -> ClipSource:
    return ClipSource(name="test", url=url, labels=labels, rule=WindowRule(**{"num_frames": 4, **rule}))


def test_the_flat_list_is_every_window_of_every_chosen_episode(url):
    windows = ClipWindows(source(url, "pour", start_every=5, max_source_frames=30))
    expected = [(sample, window) for sample, count in ((1, 3), (5, 3)) for window in range(count)]
    assert [windows.locate(clip) for clip in range(len(windows))] == expected
    assert windows.key(4) == "clip-00005/00001"
    assert (windows.source_id(4), windows.text(4), windows.label(4)) == ("take/00005", "pour once more", "pour")
    for clip in (-1, 6):
        with pytest.raises(InputError, match=f"clip {clip} "):
            windows.locate(clip)


def test_without_labels_all_samples_of_the_split_count(url):
    assert {ClipWindows(source(url)).label(clip) for clip in range(len(ClipWindows(source(url))))} == {
        "push",
        "pour",
        "fold",
    }
    held_out = ClipWindows(source(url).model_copy(update={"split": "validation"}))
    assert {held_out.text(clip) for clip in range(len(held_out))} == {"push unseen"}


def test_labels_are_counted(url):
    assert labels_of(ClipWindows(source(url)).dataset) == {"fold": 1, "pour": 3, "push": 2}


def test_frames_are_those_of_the_indices(url):
    windows = ClipWindows(source(url, "pour", start_every=5, stride=3))
    assert windows.frame_indices(2) == (10, 11, 11, 11)
    frames = windows.frames(2)
    assert frames.shape == (4, 16, 16, 3) and frames.dtype == np.uint8
    assert frames[:, 3, 5, 1].tolist() == [level(10), level(11), level(11), level(11)]


def test_cameras_share_the_frames_that_all_of_them_have(url):
    fold = source(url, "fold", start_every=4, stride=4)
    assert [ClipWindows(fold).frame_indices(clip) for clip in range(3)] == [(0, 4, 8, 8), (4, 8, 8, 8), (8, 8, 8, 8)]
    assert ClipWindows(fold).camera(0) == "0", "without a main camera and shares the first name is seen"
    both = ClipWindows(fold.model_copy(update={"cameras": {"1": 0.5, "0": 0.5}}))
    assert both.camera(0) == "1"
    assert both.frames(0, "0")[:, 0, 0, 0].tolist() == [level(frame, 1) for frame in (0, 4, 8, 8)]
    assert both.frames(0)[:, 0, 0, 0].tolist() == [level(frame, 0) for frame in (0, 4, 8, 8)]
    longer = ClipWindows(fold.model_copy(update={"cameras": {"1": 1.0}}))
    assert longer.frame_indices(1) == (4, 8, 10, 10)
    assert longer.frame_indices(1, "0") == (4, 8, 8, 8), "another camera that ends earlier repeats its own last frame"


def test_arrays_follow_the_frames(tmp_path):
    count = 10
    arrays = {
        "proprioception": np.arange(count * 2, dtype=np.float32).reshape(count, 2),
        "actions": np.arange(count - 1, dtype=np.float32)[:, None] + 100,
        "goal": np.zeros(3, np.float32),
        "scalar": np.float32(3),
    }
    windows = ClipWindows(source(make_takes(tmp_path / "d", [Take(count, arrays=arrays)]), start_every=3, stride=2))
    early, late = windows.arrays(0), windows.arrays(2)
    assert windows.frame_indices(0) == (0, 2, 4, 6) and windows.frame_indices(2) == (6, 8, 9, 9)
    assert set(early) == {"proprioception", "actions"} and set(late) == {"proprioception"}
    assert early["actions"][:, 0].tolist() == [100, 102, 104, 106]
    assert late["proprioception"][:, 0].tolist() == [12, 16, 18, 18]


def test_arrays_keep_the_rate_of_the_source(tmp_path):
    arrays = {"actions": np.arange(29, dtype=np.float32), "timestamps": np.arange(10, dtype=np.float32)}
    windows = ClipWindows(source(make_takes(tmp_path / "d", [Take(10, arrays=arrays, stride=3)]), stride=2))
    assert windows.arrays(0)["actions"].tolist() == [0, 6, 12, 18]
    assert windows.arrays(0)["timestamps"].tolist() == [0, 2, 4, 6]


def test_a_pickled_list_reads_the_same(url):
    windows = ClipWindows(source(url, "pour"))
    windows.frames(0)
    again = pickle.loads(pickle.dumps(windows))
    assert len(again) == len(windows) and np.array_equal(again.frames(3), windows.frames(3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": ("poor",)}, InputError, "no label 'poor' in split 'train', only 'fold', 'pour', 'push'."),
        (
            {"split": "validation", "labels": ("pour",)},
            InputError,
            "no label 'pour' in split 'validation', only 'push'.",
        ),
        ({"cameras": {"wrist": 1.0}, "labels": ("fold",)}, DataError, "take/00004 of .* no camera 'wrist', only 0, 1"),
        ({"rule": WindowRule(num_frames=6)}, DataError, "take/00002 of .* has 5 frames, a clip has 6"),
        ({"rule": WindowRule(num_frames=50, short="drop")}, InputError, "leaves none of 6 episodes"),
    ],
)
def test_what_cannot_be_cut_is_one_line(url, change, error, words):
    with pytest.raises(error, match=words) as caught:
        ClipWindows(source(url).model_copy(update=change))
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_one_line(tmp_path):
    url = make_takes(tmp_path / "d", [Take(8)])
    with pytest.raises(InputError, match="no samples of split 'validation'"):
        ClipWindows(ClipSource(name="test", url=url, split="validation", rule=WindowRule(num_frames=4)))
