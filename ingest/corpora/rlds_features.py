"""`features.json` of an RLDS data set: which of its features are cameras, words, actions and states.

The rates are not in the files. Those here are the control rates of the Open X-Embodiment overview, where at least two
conversions of these data sets to other formats (any4lerobot's and Open-WAM's tables among them) have the same number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import InputError
from infra.storage import join
from ingest.corpora.cameras import camera_names
from ingest.corpora.tables import read_object

FEATURES = "features.json"
STEPS, OBSERVATION, ACTION, EPISODE = "steps/", "steps/observation/", "steps/action", "episode_metadata/"
ASSUMED_FPS = 10.0
CONVERTED = "_converted_externally_to_rlds"  # the ending of many names
CONTROL_RATES_HZ = {
    "austin_buds_dataset": 20.0,
    "austin_sailor_dataset": 20.0,
    "austin_sirius_dataset": 20.0,
    "bc_z": 10.0,
    "berkeley_autolab_ur5": 5.0,
    "berkeley_cable_routing": 10.0,
    "berkeley_fanuc_manipulation": 10.0,
    "bridge": 5.0,
    "bridge_dataset": 5.0,
    "cmu_stretch": 10.0,
    "columbia_cairlab_pusht_real": 10.0,
    "dlr_edan_shared_control": 5.0,
    "droid": 15.0,
    "fractal20220817_data": 3.0,
    "furniture_bench_dataset": 10.0,
    "iamlab_cmu_pickup_insert": 20.0,
    "jaco_play": 10.0,
    "kuka": 10.0,
    "language_table": 10.0,
    "nyu_door_opening_surprising_effectiveness": 3.0,
    "nyu_franka_play_dataset": 3.0,
    "nyu_rot_dataset": 3.0,
    "roboturk": 10.0,
    "stanford_hydra_dataset": 10.0,
    "stanford_kuka_multimodal_dataset": 20.0,
    "taco_play": 15.0,
    "toto": 30.0,
    "ucsd_kitchen_dataset": 2.0,
    "ucsd_pick_and_place_dataset": 3.0,
    "utaustin_mutex": 20.0,
    "viola": 20.0,
}
INSTRUCTIONS = (
    "steps/language_instruction",
    "steps/language_instruction_2",
    "steps/language_instruction_3",
    "steps/natural_language_instruction",
    "steps/observation/natural_language_instruction",
    "steps/observation/language_instruction",
    "steps/observation/instruction",
)
STATES = tuple(
    f"{OBSERVATION}{name}" for name in ("state", "proprio", "robot_state", "robot_obs", "cartesian_position")
)


@dataclass(frozen=True)
class Features:
    """What a data set's episodes hold. Keys are the names of features in its records."""

    cameras: Mapping[str, str]  # key -> camera name
    left_out: tuple[str, ...]  # pictures that are no colour pictures, parts of actions that are no floats
    instructions: Mapping[str, int]  # key -> code points a step, 0 for text
    actions: Mapping[str, int]  # key -> numbers a step, in the order they are joined
    proprioception: Mapping[str, int]
    facts: tuple[str, ...]  # of the whole episode


def read_features(root: str, folder: str) -> Features:
    """Raises `InputError` when the file is missing, of an older format, or describes no episodes of steps."""
    place = join(root, folder, FEATURES) if folder else join(root, FEATURES)
    record = read_object(place)
    if "featuresDict" not in record:
        raise InputError(f"{place} is no description of features.", remedy="Those of old releases cannot be read.")
    leaves = dict(_leaves(record, ""))
    if not any(key.startswith(STEPS) for key in leaves):
        raise InputError(f"{place} has no feature 'steps'.", remedy="RLDS episodes have one.")
    pictures = {key: leaf["image"] for key, leaf in leaves.items() if key.startswith(STEPS) and "image" in leaf}
    colour = sorted(key for key, image in pictures.items() if _is_colour(image))
    actions = {key: leaf for key, leaf in leaves.items() if key == ACTION or key.startswith(f"{ACTION}/")}
    sizes = {key: size for key, leaf in sorted(actions.items()) if (size := _numbers(leaf, whole=key == ACTION))}
    words = {key: _words(leaves[key]) for key in INSTRUCTIONS if key in leaves}
    states = {key: size for key in STATES if (size := _numbers(leaves.get(key, {}), whole=False))}
    return Features(
        cameras=camera_names(colour, (OBSERVATION, STEPS)),
        left_out=tuple(sorted({*pictures, *actions} - {*colour, *sizes})),
        instructions={key: size for key, size in words.items() if size is not None},
        actions=sizes,
        proprioception=dict(list(states.items())[:1]),
        facts=tuple(sorted(key for key in leaves if key.startswith(EPISODE))),
    )


def control_rate(name: str) -> tuple[float, str]:
    """(frames a second, where that is from) of a data set by its name."""
    rate = CONTROL_RATES_HZ.get(name.removesuffix(CONVERTED))
    return (rate, "published control rate") if rate else (ASSUMED_FPS, "assumed")


def _leaves(node: Mapping[str, Any], prefix: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(key in the records, description) of every feature that is neither a dictionary nor the steps."""
    inner = node.get("featuresDict")
    if isinstance(inner, dict) and isinstance(inner.get("features"), dict):
        parts = [(f"{prefix}{name}", part) for name, part in inner["features"].items() if isinstance(part, dict)]
        return [leaf for key, part in parts for leaf in _leaves(part, f"{key}/")]
    steps = node.get("sequence")
    if prefix == STEPS and isinstance(steps, dict) and isinstance(steps.get("feature"), dict):
        return _leaves(steps["feature"], prefix)
    return [(prefix.rstrip("/"), node)]


def _is_colour(image: Any) -> bool:
    shape = _shape(image)
    return shape is not None and len(shape) == 3 and shape[2] == 3 and image.get("dtype", "uint8") == "uint8"


def _numbers(leaf: Mapping[str, Any], *, whole: bool) -> int:
    """Numbers a step of a tensor of floats, or with `whole` of integers too; 0 for everything else."""
    tensor = leaf.get("tensor")
    shape = _shape(tensor)
    # One that is packed into bytes, perhaps compressed, is no list of numbers in the record.
    if not isinstance(tensor, dict) or shape is None or tensor.get("encoding", "none") not in ("", "none"):
        return 0
    kinds = ("float", "bfloat", "int", "uint") if whole else ("float", "bfloat")
    is_fixed = all(size > 0 for size in shape)
    return math.prod(shape) if is_fixed and str(tensor.get("dtype")).startswith(kinds) else 0


def _words(leaf: Mapping[str, Any]) -> int | None:
    """0 for text, the number of code points for a list of them, None for what is neither."""
    if "text" in leaf:
        return 0
    tensor = leaf.get("tensor")
    if isinstance(tensor, dict) and tensor.get("dtype") in ("string", "object"):
        return 0
    size = _numbers(leaf, whole=True)
    return size if size and str(leaf["tensor"].get("dtype")).startswith(("int", "uint")) else None


def _shape(described: Any) -> tuple[int, ...] | None:
    """The shape in a description, -1 for a size that differs; None if there is none."""
    if not isinstance(described, dict) or not isinstance(described.get("shape"), dict):
        return None
    try:
        return tuple(int(size) for size in described["shape"].get("dimensions", ()))
    except (TypeError, ValueError):
        return None
