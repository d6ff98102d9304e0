"""Exact masks from the simulator: which shapes are the robot's arm, and which belong to what it moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.simulators.metaworld import visible_geoms

ARM_ROOT = "right_arm_base_link"
MOVED_M = 0.005
MOVED_ROTATION = 0.03  # largest change of a rotation matrix's entry, about 2 degrees
BACKGROUND, ARM, OBJECT = 0, 1, 2

Geoms = npt.NDArray[np.bool_]


def arm_geoms(model: Any) -> Geoms:
    """(num_geoms,) the visible shapes of the arm and its gripper, without pedestal and torso."""
    return _below(model, {ARM_ROOT}) & visible_geoms(model)


def moved_geoms(model: Any, positions_TG3: npt.NDArray[np.float64], rotations_TG9: npt.NDArray[np.float64]) -> Geoms:
    """(num_geoms,) the visible shapes that moved or turned over T moments, the robot and its mocap handle left out."""
    moved = np.abs(positions_TG3 - positions_TG3[:1]).max(axis=(0, 2)) > MOVED_M
    turned = np.abs(rotations_TG9 - rotations_TG9[:1]).max(axis=(0, 2)) > MOVED_ROTATION
    handles = {model.body(body).name for body in range(model.nbody) if model.body_mocapid[body] >= 0}
    return (moved | turned) & visible_geoms(model) & ~_below(model, {"base", *handles})


def label_map(geom_ids_HW: npt.NDArray[np.int32], *, arm: Geoms, thing: Geoms) -> npt.NDArray[np.uint8]:
    """(H, W) 0 background, 1 arm, 2 object, from what `Renderer.geom_ids` saw at each pixel."""
    by_geom = np.zeros(len(arm) + 1, np.uint8)  # the last entry answers id -1, nothing
    by_geom[:-1][arm] = ARM
    by_geom[:-1][thing] = OBJECT
    return by_geom[geom_ids_HW]


def _below(model: Any, roots: set[str]) -> Geoms:
    inside = np.zeros(model.nbody, bool)
    for body in range(model.nbody):  # parents come before their children
        inside[body] = model.body(body).name in roots or inside[model.body_parentid[body]]
    return inside[model.geom_bodyid]
