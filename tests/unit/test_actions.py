"""The action codec: targets relative to the state, normalised per dimension, and commands back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import DataError
from training.models.common.actions import ActionCodec, CodecConfig, to_targets

EVERY = torch.ones(64, 3, dtype=torch.bool)


def windows(action_dim: int, state_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, action_dim, generator=draw), torch.randn(64, state_dim, generator=draw)


def poses(count: int) -> torch.Tensor:
    """(count, 19): position, unit quaternion of either sign, joints."""
    values = torch.randn(count, 19, generator=torch.Generator().manual_seed(1))
    values[:, 3:7] /= values[:, 3:7].norm(dim=1, keepdim=True)
    return values


def quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamilton's product, scalar last."""
    (ax, ay, az, aw), (bx, by, bz, bw) = a, b
    return np.array([
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    ])  # fmt: skip


def roll_pitch_yaw(q: np.ndarray) -> list[float]:
    """Tait-Bryan angles of a scalar-last quaternion: x, then y, then z about fixed axes."""
    x, y, z, w = q
    return [
        np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
        np.arcsin(np.clip(2 * (w * y - z * x), -1, 1)),
        np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
    ]


def test_deviation_scaling_brings_actions_to_the_denoisers_scale_and_back():
    actions, state = windows(4, 4)
    actions = actions * torch.tensor([0.1, 3.0, 1e-6, 1.0]) + torch.tensor([1.0, -2.0, 0.5, 0.0])
    codec = ActionCodec.fit(CodecConfig(action_range=None), actions, state, EVERY)
    encoded = codec.encode(actions, state)
    assert encoded.flatten(0, 1).std(dim=0, correction=0)[[0, 1, 3]].tolist() == pytest.approx([0.5] * 3, rel=1e-4)
    assert encoded[..., 2].abs().max() < 1e-4  # a dimension that hardly moves is not blown up
    torch.testing.assert_close(codec.decode(encoded, state), actions, atol=1e-5, rtol=1e-5)
    assert ActionCodec.parse(codec.to_json()) == codec


def test_masked_actions_do_not_count():
    actions, state = windows(2, 2)
    mask = EVERY.clone()
    mask[:, 2] = False
    actions[:, 2] = 1e6
    codec = ActionCodec.fit(CodecConfig(), actions, state, mask)
    assert codec.scale == pytest.approx(
        (actions[:, :2].flatten(0, 1).std(dim=0, correction=0) / 0.5).tolist(), rel=1e-5
    )


def test_bounds_scaling_maps_percentiles_to_the_unit_interval_and_clips():
    actions = torch.arange(101.0).view(101, 1, 1)
    codec = ActionCodec.fit(
        CodecConfig(scaling="bounds", action_range=None), actions, torch.zeros(101, 1), torch.ones(101, 1).bool()
    )
    encoded = codec.encode(actions, torch.zeros(101, 1)).flatten()
    assert encoded[[0, 1, 50, 99, 100]].tolist() == pytest.approx([-1, -1, 0, 1, 1])


def test_binary_dimensions_open_or_close():
    codec = ActionCodec(
        config=CodecConfig(scaling="none", binary=(1,)),
        offset=(0.0, 0.0), scale=(1.0, 1.0), state_offset=(), state_scale=(),
    )  # fmt: skip
    decoded = codec.decode(torch.tensor([[[0.3, 0.1], [3.0, -0.2]]]), torch.zeros(1, 0))
    assert decoded.tolist() == [[[pytest.approx(0.3), 1.0], [1.0, -1.0]]]


@pytest.mark.parametrize("order", ["xyzw", "wxyz"])
def test_xhand_targets_are_the_pose_seen_from_the_wrist(order):
    config = CodecConfig(transform="xhand", quaternion=order)
    state, commands = poses(8), poses(24).view(8, 3, 19)
    targets = to_targets(config, commands, state)
    for row in range(8):
        current, command = (values.double().numpy() for values in (state[row], commands[row, 1]))
        turn = [pose[3:7] if order == "xyzw" else np.roll(pose[3:7], -1) for pose in (current, command)]
        inverse = turn[0] * [-1, -1, -1, 1]
        angles = roll_pitch_yaw(quaternion_product(inverse, turn[1]))
        wanted = [*(command[:3] - current[:3]), *angles, *command[7:]]
        assert targets[row, 1].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("transform", ["xhand", "xbot"])
def test_commands_survive_the_way_there_and_back(transform):
    hands = 1 if transform == "xhand" else 2
    state = torch.cat([poses(64)] * hands, dim=-1)
    commands = torch.cat([poses(192).view(64, 3, 19)] * hands, dim=-1)
    codec = ActionCodec.fit(CodecConfig(transform=transform, action_range=None), commands, state, EVERY)
    decoded = codec.decode(codec.encode(commands, state), state)
    for start in range(0, 19 * hands, 19):
        sign = torch.where(commands[..., start + 3 : start + 4] < 0, -1.0, 1.0)
        commands[..., start + 3 : start + 7] *= sign  # both signs are one rotation; the codec writes the first
    torch.testing.assert_close(decoded, commands, atol=1e-4, rtol=1e-4)


def test_the_sign_of_a_quaternion_changes_nothing():
    config = CodecConfig(transform="xhand")
    state, commands = poses(8), poses(24).view(8, 3, 19)
    flipped = state.clone()
    flipped[:, 3:7] *= -1
    torch.testing.assert_close(to_targets(config, commands, flipped), to_targets(config, commands, state))
    codec = ActionCodec.fit(config, commands, state, torch.ones(8, 3).bool())
    torch.testing.assert_close(codec.state(flipped), codec.state(state))


def test_a_transform_refuses_other_robots():
    with pytest.raises(DataError, match="needs commands and states of 19 numbers, not 4 and 4"):
        to_targets(CodecConfig(transform="xhand"), torch.zeros(2, 3, 4), torch.zeros(2, 4))


@pytest.mark.skipif(not os.environ.get("FOREFRAME_CORPUS"), reason="FOREFRAME_CORPUS is not set")
def test_corpus_episode_moves_its_hand_little_between_decisions():
    path = next((Path(os.environ["FOREFRAME_CORPUS"]) / "xhand" / "annotation").rglob("*.json"))
    episode = json.loads(path.read_text())
    states, commands = torch.tensor(episode["states"]), torch.tensor(episode["actions"])
    targets = to_targets(CodecConfig(transform="xhand"), commands[:, None], states)[:, 0]
    assert targets.shape[1] == 18
    # Command and state carry quaternions of opposite sign there: taken as they are, the wrist would turn over.
    assert targets[:, 3:6].abs().max() < 0.5
    assert targets[:, :3].abs().max() < 0.05
