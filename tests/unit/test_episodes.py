"""Action windows: chunks end with the episode, rows point at the right frame."""

from __future__ import annotations

import numpy as np
import pytest

from infra.errors import ConfigError, DataError
from ingest.reader import ShardDataset
from ingest.schema import frame_suffix
from ingest.shard import Member
from tests.helpers_data import jpeg, make_episode_dataset, moving_square, npz, sample_record, write_dataset
from training.data.episodes import ActionWindows, iter_frames, load_episodes


@pytest.mark.parametrize("last_frame_has_action", [False, True])
def test_windows_hold_the_actions_that_follow_their_frame(tmp_path, last_frame_has_action):
    url = make_episode_dataset(
        tmp_path / "d", num_episodes=3, num_frames=9, size=16, last_frame_has_action=last_frame_has_action
    )
    dataset = ShardDataset(url)
    windows = ActionWindows(load_episodes(dataset), chunk=4)
    num_actions = 9 if last_frame_has_action else 8
    assert len(windows) == 3 * num_actions
    batch = windows.batch(np.arange(len(windows)))
    number = 0
    for episode in range(3):
        arrays = dataset.arrays(episode)
        for frame in range(num_actions):
            assert (int(batch.episodes[number]), int(batch.frames[number])) == (episode, frame)
            assert np.array_equal(batch.proprioception[number], arrays["proprioception"][frame])
            ahead = [arrays["actions"][min(step, num_actions - 1)] for step in range(frame, frame + 4)]
            assert np.array_equal(batch.actions[number], np.stack(ahead))
            assert batch.mask[number].tolist() == [step < num_actions for step in range(frame, frame + 4)]
            number += 1


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_feature_rows_point_at_the_frames_in_order(tmp_path, layout):
    dataset = ShardDataset(make_episode_dataset(tmp_path / "d", num_frames=9, size=32, layout=layout))
    episodes = load_episodes(dataset)
    pieces = list(iter_frames(dataset, episodes, batch_size=4))
    assert [len(piece) for piece in pieces] == [4, 4, 1] * 3
    features = np.concatenate(pieces)
    batch = ActionWindows(episodes, chunk=1).batch([0, 7, 8, 23])
    for row, episode, frame in zip(batch.feature_rows, batch.episodes, batch.frames, strict=True):
        original = moving_square(9, 32, int(episode))[int(frame)].astype(int)
        assert np.abs(features[row] - original).mean() < 8
        others = moving_square(9, 32, (int(episode) + 1) % 3)[int(frame)].astype(int)
        assert np.abs(features[row] - others).mean() > 8


def test_episodes_say_what_they_are(tmp_path):
    episode = load_episodes(ShardDataset(make_episode_dataset(tmp_path / "d", num_episodes=1, size=16)))[0]
    assert (episode.text, episode.task, episode.num_frames) == ("move the square", "move-square", 20)


@pytest.mark.parametrize(
    "arrays",
    [
        {"actions": np.zeros((3, 4), np.float32)},
        {"actions": np.zeros((1, 4), np.float32), "proprioception": np.zeros((3, 4), np.float32)},
        {"actions": np.zeros((4, 4), np.float32), "proprioception": np.zeros((3, 4), np.float32)},
        {"actions": np.zeros((3, 4), np.float32), "proprioception": np.zeros((2, 4), np.float32)},
        {"actions": np.zeros(3, np.float32), "proprioception": np.zeros((3, 4), np.float32)},
        {"actions": np.full((3, 4), np.nan, np.float32), "proprioception": np.zeros((3, 4), np.float32)},
    ],
)
def test_arrays_that_do_not_fit_the_frames_are_refused(tmp_path, arrays):
    record = sample_record(0, "frames", 3, 16, metadata={}, has_arrays=True)
    pictures = [Member(frame_suffix(index), jpeg(frame), index) for index, frame in enumerate(moving_square(3, 16, 0))]
    members = [Member("json", record.model_dump_json().encode()), *pictures, Member("npz", npz(arrays))]
    dataset = ShardDataset(write_dataset(tmp_path / "d", 1, 3, lambda _: members))
    with pytest.raises(DataError, match="square/00000"):
        load_episodes(dataset)


def test_no_episodes_and_no_chunk_are_refused(tmp_path):
    with pytest.raises(DataError):
        ActionWindows([], chunk=1)
    with pytest.raises(ConfigError):
        ActionWindows([], chunk=0)


def test_windows_start_where_enough_actions_are_left_and_at_every_nth_frame(tmp_path):
    episodes = load_episodes(ShardDataset(make_episode_dataset(tmp_path / "d", num_episodes=3, num_frames=9, size=16)))
    counts = [len(episode.actions) for episode in episodes]
    windows = ActionWindows(episodes, chunk=2, least=3, every=2)
    seen = windows.batch(range(len(windows)))
    wanted = [(e, f) for e, count in enumerate(counts) for f in range(0, count - 2, 2)]
    assert list(zip(seen.episodes.tolist(), seen.frames.tolist(), strict=True)) == wanted
    with pytest.raises(DataError, match="no episode has 1000 actions"):
        ActionWindows(episodes, chunk=1, least=1000)
