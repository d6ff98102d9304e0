"""The 1,000 published chains, and where robot and scene stand when one begins.

The chains are `sequences.json`: the output of the official generator. The start of a chain follows from its symbolic
state ("slider left, red block on the table"): fixed places, and table slots and block angles drawn from a generator
that is seeded with a hash of that state. Facts from mees/calvin, calvin_models/calvin_agent/evaluation/utils.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra.digests import sha256_bytes

Floats = npt.NDArray[np.float64]

SEQUENCES = Path(__file__).with_name("sequences.json")
FNV_PRIME = 0x01000193
SCENE_DIM = 24
# Hand position and Euler angles, gripper width, seven joints, last gripper command.
ROBOT_START = (
    0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963,
    -1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0,
)  # fmt: skip
SLIDER_PLACES = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
TABLE_SLOTS = ((5.00000896e-02, -1.20000177e-01, 4.59990009e-01), (2.29995412e-01, -1.19995140e-01, 4.59990010e-01))
BLOCK_ANGLES = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
# Where a scene vector holds what; a block has three coordinates and three angles.
SLIDER, DRAWER, SWITCH, LIGHTBULB, LED = 0, 1, 3, 4, 5
BLOCKS = {"red_block": 6, "blue_block": 12, "pink_block": 18}
SLIDER_OPEN, DRAWER_OPEN, SWITCH_ON = 0.28, 0.22, 0.088


@dataclass(frozen=True)
class Chain:
    """Five subtasks in order, from one start."""

    number: int
    tasks: tuple[str, ...]
    state: dict[str, int | str]  # in the order of the generator, which the hash depends on

    @property
    def item_id(self) -> str:
        """`chain/00042`: equal for equal chains of two models."""
        return f"chain/{self.number:05d}"


@dataclass(frozen=True)
class ChainFile:
    """What `sequences.json` holds."""

    chains: tuple[Chain, ...]
    tasks: tuple[str, ...]  # all names that occur
    version: str
    digest: str  # sha256 of the file


@lru_cache(maxsize=1)
def read_chains() -> ChainFile:
    """The published chains in their order."""
    data = SEQUENCES.read_bytes()
    value = json.loads(data)
    names, fields = tuple(value["tasks"]), value["state_fields"]
    chains = tuple(
        Chain(number, tuple(names[index] for index in sequence), dict(zip(fields, state, strict=True)))
        for number, (sequence, state) in enumerate(zip(value["sequences"], value["initial_states"], strict=True))
    )
    return ChainFile(chains, names, value["version"], sha256_bytes(data))


def start_of(state: dict[str, int | str]) -> tuple[Floats, Floats]:
    """(robot state (15,), scene state (24,)) of a symbolic state."""
    generator = np.random.RandomState(state_seed(state))  # numpy's old generator: the published draws
    slots = list(TABLE_SLOTS)
    generator.shuffle(slots)
    scene = np.zeros(SCENE_DIM)
    scene[SLIDER] = SLIDER_OPEN if state["slider"] == "left" else 0.0
    scene[DRAWER] = DRAWER_OPEN if state["drawer"] == "open" else 0.0
    scene[SWITCH] = SWITCH_ON if state["lightbulb"] == 1 else 0.0
    scene[LIGHTBULB], scene[LED] = state["lightbulb"], state["led"]
    # At most two blocks lie on the table: blue gives way to red, pink has the second slot.
    slot_of = {"red_block": 0, "blue_block": int(state["red_block"] == "table"), "pink_block": 1}
    for block, start in BLOCKS.items():
        scene[start : start + 3] = SLIDER_PLACES.get(str(state[block]), slots[slot_of[block]])
        scene[start + 5] = generator.uniform(*BLOCK_ANGLES)
    return np.array(ROBOT_START), scene


def state_seed(state: dict[str, int | str]) -> int:
    """The seed that the official evaluation draws a start with: the hash of the printed values of its dictionary."""
    return fnv1_32(str(state.values()).encode("utf-16-le"))  # pyhash hashes a Python string as UTF-16


def fnv1_32(data: bytes, *, basis: int = 0) -> int:
    """FNV-1 in 32 bits: multiply, then xor each byte. pyhash begins at 0, the published basis is 0x811C9DC5."""
    value = basis
    for byte in data:
        value = (value * FNV_PRIME & 0xFFFFFFFF) ^ byte
    return value
