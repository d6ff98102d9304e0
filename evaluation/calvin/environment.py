"""The environment of a user's CALVIN checkout behind two small protocols; imported only when a chain begins.

No code and no asset of CALVIN is part of this project. Facts from mees/calvin and mees/calvin_env.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evaluation.calvin.config import CAMERAS, STATE_DIM, CalvinConfig
from infra.digests import sha256_bytes, sha256_file, sha256_json
from infra.errors import DataError, InputError, MachineError

Floats = npt.NDArray[np.float64]
Picture = npt.NDArray[np.uint8]

ENV_PACKAGES = ("calvin_env/calvin_env", "calvin_env")
SENTENCES = (
    "calvin_models/conf/annotations/new_playtable_validation.yaml",
    "conf/annotations/new_playtable_validation.yaml",
)
ORACLES = (
    "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml",
    "calvin_env/conf/tasks/new_playtable_tasks.yaml",
    "conf/tasks/new_playtable_tasks.yaml",
)
RECORD = "validation/.hydra/merged_config.yaml"
# module -> the package that brings it
NEEDED = {
    "pybullet": "pybullet",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "hydra_plugins": "hydra-colorlog",
    "gym": "gym",
    "cv2": "opencv-python-headless",
    "quaternion": "numpy-quaternion",
    "git": "gitpython",
}


class CalvinEnvironment(Protocol):
    """What the suite needs of the simulator; CALVIN's own environment has this form.

    An observation holds `rgb_obs` (`rgb_static` (200, 200, 3) and `rgb_gripper` (84, 84, 3), uint8) and `robot_obs`
    (15,). What `get_info` gives is for the oracle alone.
    """

    def reset(self, robot_obs: Floats, scene_obs: Floats) -> Any:
        """Put robot and scene where a chain begins."""
        ...

    def get_obs(self) -> Mapping[str, Any]:
        """What is seen now."""
        ...

    def get_info(self) -> Any:
        """What the oracle compares."""
        ...

    def step(self, action: Floats) -> tuple[Mapping[str, Any], float, bool, Any]:
        """One relative action (7,), its gripper exactly -1 or 1 -> (observation, reward, done, info)."""
        ...

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class TaskOracle(Protocol):
    """Tells which tasks were solved between two infos; CALVIN's `Tasks` has this form."""

    def get_task_info_for_set(self, start_info: Any, end_info: Any, task_filter: set[str]) -> set[str]:
        """Those of `task_filter` that the change from start to end solves."""
        ...


@dataclass(frozen=True)
class World:
    """An environment and the judge of its tasks."""

    environment: CalvinEnvironment
    oracle: TaskOracle


class Benchmark(Protocol):
    """Where worlds come from. It is pickled to the processes that play chains, so it holds plain values."""

    def sentences(self) -> dict[str, str]:
        """The instruction of each task."""
        ...

    def facts(self) -> dict[str, str]:
        """What decides results besides policy and chains: digests and versions. They enter the suite's version."""
        ...

    def build(self) -> World:
        """A fresh world."""
        ...


@dataclass(frozen=True)
class Seen:
    """One observation: pictures by our camera names, and the robot's state (15,)."""

    images: dict[str, Picture]
    proprioception: npt.NDArray[np.float32]

    @classmethod
    def of(cls, observation: Mapping[str, Any]) -> Seen:
        """From CALVIN's dictionary; `DataError` if a camera or the state is not there."""
        pictures, state = observation.get("rgb_obs", {}), np.asarray(observation.get("robot_obs", ()), np.float32)
        missing = [name for name in CAMERAS.values() if name not in pictures]
        if missing or state.shape != (STATE_DIM,):
            raise DataError(
                f"a CALVIN observation lacks {', '.join(missing) or f'robot_obs of {STATE_DIM} numbers'}.",
                remedy="Use the cameras static and gripper and a robot with Euler angles (euler_obs).",
            )
        return cls({name: np.array(pictures[theirs], np.uint8) for name, theirs in CAMERAS.items()}, state)


@dataclass(frozen=True)
class Checkout:
    """The benchmark of a user's checkout; see `CalvinConfig` for the fields."""

    root: Path
    dataset: Path | None = None
    scene: str = "calvin_scene_D"
    seed: int = 0
    use_egl: bool = False

    @classmethod
    def of(cls, config: CalvinConfig) -> Checkout:
        """Of a config, its files checked."""
        dataset = Path(config.dataset).resolve() if config.dataset else None
        checkout = cls(Path(config.calvin_root).resolve(), dataset, config.scene, config.seed, config.use_egl)
        checkout.check()
        return checkout

    def check(self) -> None:
        """Raise what is missing, in one line: `InputError` for a file, `MachineError` for a package."""
        for places in (self._package_places(), SENTENCES, ORACLES):
            self._find(places)
        if self.dataset and not (self.dataset / RECORD).is_file():
            raise InputError(f"{self.dataset} has no {RECORD}.", remedy="Give a CALVIN data set folder, or none.")
        if not self.dataset and not (self._conf / "scene" / f"{self.scene}.yaml").is_file():
            known = sorted(path.stem for path in (self._conf / "scene").glob("*.yaml"))
            raise InputError(f"{self._conf}/scene has no {self.scene}.yaml.", remedy=f"Scenes: {', '.join(known)}.")
        missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
        if missing:
            raise MachineError(
                f"CALVIN needs packages that are not installed: {', '.join(missing)}.",
                remedy=f"pip install {' '.join(missing)}",
            )

    def sentences(self) -> dict[str, str]:
        """The first validation annotation of each task."""
        import yaml

        path = self._find(SENTENCES)
        found = yaml.safe_load(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(row, list) and row for row in found.values()):
            raise InputError(f"{path} is not a list of sentences for each task.", remedy="Check out the file again.")
        return {str(task): str(rows[0]) for task, rows in found.items()}

    def facts(self) -> dict[str, str]:
        """Digests of the oracle, of the environment's code and configuration; version of the physics engine."""
        package = self._package
        code = {str(path.relative_to(package)): sha256_file(path) for path in sorted(package.rglob("*.py"))}
        conf = sorted(self._conf.rglob("*.yaml")) if not self.dataset else [self.dataset / RECORD]
        return {
            "scene": self.dataset.name if self.dataset else self.scene,
            "oracle": sha256_file(self._find(ORACLES)),
            "code": sha256_json(code),
            "configuration": sha256_bytes("".join(sha256_file(path) for path in conf).encode()),
            "pybullet": version("pybullet"),
            "renderer": "egl" if self.use_egl else "tiny",
        }

    def build(self) -> World:
        """Import CALVIN and build its environment and oracle. `InputError` if another copy of it is on the path."""
        self.check()
        source = str(self._package.parent)
        if source not in sys.path:
            sys.path.insert(0, source)
        calvin_env, omegaconf = import_module("calvin_env"), import_module("omegaconf")
        instantiate = import_module("hydra.utils").instantiate
        if not Path(str(calvin_env.__file__)).resolve().is_relative_to(self._package):
            raise InputError(
                f"Python has calvin_env from {calvin_env.__file__}, not from {self.root}.",
                remedy="Uninstall that copy, or give its checkout as calvin_root.",
            )
        settings = {"show_gui": False, "use_vr": False, "use_scene_info": True, "use_egl": self.use_egl}
        environment = instantiate(self._configuration().env, seed=self.seed, **settings)
        return World(environment, instantiate(omegaconf.OmegaConf.load(self._find(ORACLES))))

    def _configuration(self) -> Any:
        if self.dataset:
            recorded = import_module("omegaconf").OmegaConf.load(self.dataset / RECORD)
            for camera in set(recorded.cameras) - set(CAMERAS):
                del recorded.cameras[camera]  # tactile cameras need a package of their own
            return recorded
        overrides = ["cameras=static_and_gripper", "use_vr=false", f"scene={self.scene}"]
        hydra = import_module("hydra")
        with hydra.initialize_config_dir(str(self._conf), version_base=None):
            return hydra.compose("config_data_collection", [*overrides, f"data_path={self._package.parent / 'data'}"])

    @property
    def _package(self) -> Path:
        return self._find(self._package_places()).parents[1]

    @property
    def _conf(self) -> Path:
        return self._package.parent / "conf"

    @staticmethod
    def _package_places() -> tuple[str, ...]:
        return tuple(f"{place}/envs/play_table_env.py" for place in ENV_PACKAGES)

    def _find(self, places: tuple[str, ...]) -> Path:
        for place in places:
            if (self.root / place).is_file():
                return self.root / place
        raise InputError(
            f"{self.root} is no CALVIN checkout: it has no {' and no '.join(places)}.",
            remedy="git clone --recurse-submodules https://github.com/mees/calvin, and give that folder.",
        )
