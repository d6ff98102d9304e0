"""Small runs of the policies that learn from pixels, and a small video model for those that plan with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.config import override
from infra.digests import pretty_json
from ingest.schema import frame_suffix
from ingest.shard import Member
from tests.helpers_data import ACTION_DIM, jpeg, npz, sample_record, write_dataset
from tests.helpers_tvp import tiny_model
from training.export_video import save_video_export

SMALL = (
    "network.vision.width=8", "network.vision.blocks=[1, 1]", "network.vision.group_channels=4",
    "network.vision.keypoints=8", "network.vision.feature_dim=16", "schedule.steps=12", "schedule.warmup_steps=2",
    "checkpoint.every_steps=5", "global_batch_size=8", "log_every_steps=1", "compute.workers=0",
    "compute.matmul=default", "optim.ema_decay=0.8",
)  # fmt: skip
SMALL_CHUNK = (
    "network.unet.channels=[16, 32]", "network.unet.step_dim=16", "network.chunk=4", "network.execute=2",
    "network.diffusion.train_steps=20", "network.diffusion.inference_steps=4",
)  # fmt: skip


def smaller(config: Any, *assignments: str) -> Any:
    """A tiny preset, smaller still."""
    return override(config, (*SMALL, *assignments))


def make_video_model(folder: Path, *, seed: int = 0) -> str:
    """The export of a random video model: 4 frames of 32 pixels."""
    save_video_export(folder, tiny_model(seed=seed), card="A test.", inputs=["data"])
    return str(folder)


def make_ruled_dataset(folder: Path, *, num_episodes: int = 4, num_frames: int = 12, size: int = 32) -> str:
    """Episodes of a bright square on grey that goes where the actions say: 2 pixels for 1, in columns and rows.

    No two frames are equal: a corner grows brighter with time.
    """

    def sample(number: int) -> list[Any]:
        random = np.random.default_rng(number)
        actions = random.choice([-1.0, -0.5, 0.5, 1.0], (num_frames - 1, ACTION_DIM)).astype(np.float32)
        places = np.cumsum(np.concatenate([random.uniform(0.3, 0.7, (1, 2)) * size, 2 * actions[:, :2]]), axis=0)
        frames = [square_at(column, row, size) for column, row in places]
        for index, frame in enumerate(frames):
            frame[:8, :8] = 60 + 12 * index
        arrays = {"actions": actions, "proprioception": np.zeros((num_frames, 4), np.float32)}
        record = sample_record(
            number, "frames", num_frames, size, metadata={"split": "train"}, text="follow", has_arrays=True
        )
        pictures = [Member(frame_suffix(index), jpeg(frame), index) for index, frame in enumerate(frames)]
        head = Member("json", pretty_json(record.to_json()))
        return [head, *pictures, Member("txt", b"follow"), Member("npz", npz(arrays))]

    return write_dataset(folder, num_episodes, num_frames, sample)


def square_at(column: float, row: float, size: int, side: int = 8) -> np.ndarray:
    """(size, size, 3) uint8: white square with its centre at (column, row), kept inside."""
    picture = np.full((size, size, 3), 60, np.uint8)
    left, top = (round(min(max(place - side / 2, 0), size - side)) for place in (column, row))
    picture[top : top + side, left : left + side] = 240
    return picture


def fit(model: torch.nn.Module, loss_of: Any, *, steps: int, lr: float = 3e-3) -> list[float]:
    """Losses of `steps` updates of Adam on what `loss_of(step)` gives."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
