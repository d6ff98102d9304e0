"""Held-out simulator sequences with exact masks, in DAVIS layout: object 1 is the arm, object 2 what it moves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from evaluation.label_propagation.layouts import (
    DavisFolder,
    read_davis,
    write_davis_sequence,
    write_davis_split,
)
from infra.config import Config
from infra.digests import pretty_json
from infra.errors import DataError, InputError
from infra.storage import create_only, read_json
from ingest.simulators.masks import ARM, OBJECT, arm_geoms, label_map, moved_geoms
from ingest.simulators.metaworld import MetaWorldEnv, Renderer, check_camera, check_task, simulator_versions

log = logging.getLogger(__name__)

RECORD_NAME = "simulated.json"
SPLIT_FILE = "ImageSets/2017/val.txt"
MAX_STEPS = 200
STEPS_AFTER_SUCCESS = 6
MAX_SEEDS_TRIED = 10
TASKS = ("drawer-open", "window-open", "drawer-close", "button-press-topdown", "coffee-button", "handle-press")


class SequencesConfig(Config):
    """Oracle episodes without noise on seeds no training has seen, every `stride`-th step, the last `max_frames`.

    512 px gives a 32 x 32 grid at patch 16: on a coarser one the gripper vanishes, whatever the features.
    """

    tasks: tuple[str, ...] = Field(default=TASKS, min_length=1)
    first_seed: int = Field(default=20_000, ge=0)
    per_task: int = Field(default=1, ge=1)
    size: int = Field(default=512, ge=32, le=2048)
    stride: int = Field(default=3, ge=1)
    max_frames: int = Field(default=24, ge=2)
    min_pixels: int = Field(default=64, ge=1)  # smallest share of each object in the first frame
    camera: str = "corner4"

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_task(task) for task in tasks)

    @field_validator("camera")
    @classmethod
    def _known_camera(cls, camera: str) -> str:
        return check_camera(camera)


@dataclass(frozen=True)
class Sequence:
    """frames (T, H, W, 3) uint8 and labels (T, H, W) uint8: 0 background, 1 arm, 2 moving object."""

    frames: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


def simulate_davis(root: str | Path, config: SequencesConfig) -> DavisFolder:
    """Write the sequences, or find them written. Raises `InputError` if the folder holds others.

    A function of config and simulator versions: the digest of the folder's record is that of the data.
    """
    root = Path(root)
    record = {"sequences": config.to_json(), "versions": simulator_versions()}
    if not create_only(root / RECORD_NAME, pretty_json(record)) and read_json(root / RECORD_NAME) != record:
        raise InputError(f"{root} holds other simulated sequences.", remedy="Choose another folder.")
    if (root / SPLIT_FILE).is_file():
        return read_davis(root)
    names = []
    for task in config.tasks:
        with Renderer(task, camera=config.camera, size=config.size) as renderer:
            env = MetaWorldEnv(task, config.first_seed)
            names += _write_task(root, env, renderer, config)
    write_davis_split(root, tuple(names))
    log.info("%d simulated sequences in %s", len(names), root)
    return read_davis(root)


def film(env: MetaWorldEnv, renderer: Renderer, seed: int, config: SequencesConfig) -> Sequence | None:
    """One episode's pictures and masks; None where the oracle fails or an object is hardly seen at the start."""
    length = _length(env, seed)
    if length is None:
        return None
    steps = range(0, length, config.stride)[-config.max_frames :]
    wanted = set(steps)
    env.reset(seed)
    frames, ids, positions, rotations = [], [], [], []
    for step in range(steps[-1] + 1):
        if step in wanted:
            frames.append(renderer.render(env))
            ids.append(renderer.geom_ids(env))
            positions.append(env.data.geom_xpos.copy())
            rotations.append(env.data.geom_xmat.copy())
        env.step(env.oracle_action())
    arm = arm_geoms(env.model)
    thing = moved_geoms(env.model, np.stack(positions), np.stack(rotations))
    labels = np.stack([label_map(geom_ids, arm=arm, thing=thing) for geom_ids in ids])
    if min((labels[0] == value).sum() for value in (ARM, OBJECT)) < config.min_pixels:
        return None
    return Sequence(np.stack(frames), labels)


def _write_task(root: Path, env: MetaWorldEnv, renderer: Renderer, config: SequencesConfig) -> list[str]:
    names: list[str] = []
    for seed in range(config.first_seed, config.first_seed + config.per_task + MAX_SEEDS_TRIED):
        if len(names) == config.per_task:
            return names
        sequence = film(env, renderer, seed, config)
        if sequence is not None:
            names.append(f"{env.task}-{seed}")
            write_davis_sequence(root, names[-1], frames_THW3=sequence.frames, labels_THW=sequence.labels)
    raise DataError(
        f"{MAX_SEEDS_TRIED} seeds of {env.task!r} gave no sequence in which the arm and a moving object are seen.",
        remedy=f"Choose another task or camera than {config.camera!r}.",
    )


def _length(env: MetaWorldEnv, seed: int) -> int | None:
    """Steps of the oracle to its first success and a little beyond; without pictures this costs next to nothing."""
    env.reset(seed)
    for step in range(MAX_STEPS):
        if env.step(env.oracle_action()):
            return step + 1 + STEPS_AFTER_SUCCESS
    return None
