"""Meta-World: the environment with its scripted oracle, and the renderer of its cameras.

Shape letters: H height, W width. An action is (4,) float32 in [-1, 1]: dx, dy, dz of the hand and gripper effort;
proprioception is (4,) float32: hand position in metres and gripper opening from 0 to 1. 80 control steps a second.
"""

from __future__ import annotations

import atexit
import copy
import difflib
import warnings
import weakref
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from infra.config import Config
from infra.errors import ConfigError, MachineError
from ingest.simulators.opengl import is_prepared, prepare_rendering, select_backend
from ingest.simulators.sentences import GOAL_MARKER_TASKS, TASK_SENTENCES, TASKS

__all__ = [
    "ACTION_DIM",
    "CAMERAS",
    "CONTROL_HZ",
    "MAX_EPISODE_STEPS",
    "PROPRIOCEPTION_DIM",
    "MetaWorldEnv",
    "RenderFlags",
    "Renderer",
    "check_camera",
    "check_task",
    "prepare_rendering",
    "simulator_versions",
]

CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
UPSIDE_DOWN_CAMERAS = frozenset({"corner", "corner2", "corner3", "corner4"})
CONTROL_HZ = 80
MAX_EPISODE_STEPS = 500
ACTION_DIM = 4
PROPRIOCEPTION_DIM = 4
DEFAULT_RGBA = (0.5, 0.5, 0.5, 1.0)  # MuJoCo: a shape of this colour takes its material's
HIDDEN_GROUP = 5  # MuJoCo draws groups 0 to 2 unless told otherwise

FloatArray = npt.NDArray[np.float64]
Frame = npt.NDArray[np.uint8]


class RenderFlags(Config):
    """What the pictures show; recorded with every corpus, for rollouts must look the same.

    Shadows, reflections and multisampling cost 8x, 1.7x and 2x. The goal marker is the coloured dot at the target.
    """

    shadow: bool = False
    reflection: bool = False
    multisampling: int = 0
    goal_marker: bool = False

    @classmethod
    def for_task(cls, task: str) -> Self:
        """The marker is drawn in the tasks whose goal nothing else shows, and nowhere else."""
        return cls(goal_marker=check_task(task) in GOAL_MARKER_TASKS)


def check_task(task: str) -> str:
    """The name itself; `ConfigError` with a suggestion when it is not one of the 50."""
    if task in TASK_SENTENCES:
        return task
    near = difflib.get_close_matches(task, TASKS, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Tasks: {', '.join(TASKS)}."
    raise ConfigError(f"unknown Meta-World task {task!r}.", remedy=remedy)


def check_camera(camera: str) -> str:
    """The name itself; `ConfigError` when Meta-World has no such camera."""
    if camera not in CAMERAS:
        raise ConfigError(f"unknown Meta-World camera {camera!r}.", remedy=f"Cameras: {', '.join(CAMERAS)}.")
    return camera


def simulator_versions() -> dict[str, str]:
    """What decides the pixels and the physics, for the metadata."""
    names = ("metaworld", "mujoco", "gymnasium", "numpy")
    return {name: version(name) for name in names} | {"opengl": select_backend()}


class MetaWorldEnv:
    """One task; an episode is a function of its seed, to the last bit, whatever ran in the object before.

    The goal is in the observation the oracle sees, never in proprioception. An object holds about 20 MB: reuse it.
    """

    def __init__(self, task: str, seed: int) -> None:
        self.task = check_task(task)
        self.text = TASK_SENTENCES[task]
        self._env = _new_environment(task)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start the episode of a seed."""
        self.seed = seed
        # Meta-World ignores reset(seed=...) and freezes the goal unless told otherwise; these lines are its seeding.
        self._env.seed(seed)
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self.observation: FloatArray = self._env.reset()[0]
        self._oracle = _simulator().policies[f"{self.task}-v3"]()
        self.steps = 0
        # Resets move bodies after the last forward pass: without this the first picture shows the scene before that.
        mujoco = _simulator().mujoco
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    @property
    def model(self) -> Any:
        """The `mujoco.MjModel` of this episode."""
        return self._env.model

    @property
    def data(self) -> Any:
        """The `mujoco.MjData` of this episode."""
        return self._env.data

    @property
    def goal(self) -> FloatArray:
        """(3,) position of the target in metres."""
        return np.array(self._env._target_pos, dtype=np.float64)

    @property
    def goal_site(self) -> str | None:
        """Name of the site that marks the target; a few tasks have none."""
        sites = self._env._target_site_config
        return str(sites[0][0]) if sites else None

    @property
    def proprioception(self) -> npt.NDArray[np.float32]:
        """(4,) hand position and gripper opening."""
        return self.observation[:PROPRIOCEPTION_DIM].astype(np.float32)

    def oracle_action(self) -> npt.NDArray[np.float32]:
        """(4,) what the scripted expert does now, clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the oracles warn that they leave [-1, 1]; hence the clip
            action = self._oracle.get_action(self.observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def step(self, action: npt.NDArray[np.floating[Any]]) -> bool:
        """Execute (4,) clipped to [-1, 1]; returns whether the task counts as solved now (this can flicker)."""
        if self.steps >= MAX_EPISODE_STEPS:
            raise ConfigError(f"{self.task} ends after {MAX_EPISODE_STEPS} steps.", remedy="Lower max_steps.")
        self.observation, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0).astype(np.float32))
        self.steps += 1
        return bool(info["success"] > 0.5)


class Renderer:
    """Upright pictures of one camera; one renderer serves any number of environments of its task.

    A renderer belongs to the process and thread that made it. Poses come from the environment's data, everything
    else from a model of our own in which invisible shapes and foreign markers are moved to a hidden group.
    """

    def __init__(
        self, task: str, *, camera: str = "corner4", size: int = 128, flags: RenderFlags | None = None
    ) -> None:
        if not is_prepared():
            prepare_rendering()
        self.task = check_task(task)
        self.camera = check_camera(camera)
        self.size = size
        self.flags = flags if flags is not None else RenderFlags.for_task(task)
        mujoco = _simulator().mujoco
        self.model = copy.copy(_pristine_model(task))
        self.model.vis.global_.offwidth = max(size, self.model.vis.global_.offwidth)
        self.model.vis.global_.offheight = max(size, self.model.vis.global_.offheight)
        self.model.vis.quality.offsamples = self.flags.multisampling
        self.model.geom_group[~visible_geoms(self.model)] = HIDDEN_GROUP
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0
        try:
            self._renderer = mujoco.Renderer(self.model, size, size)
            _close_at_exit(self)
        except (RuntimeError, ImportError, AttributeError) as error:
            raise MachineError(
                f"the {select_backend()} renderer cannot start: {error}.", remedy="Run `foreframe doctor`."
            ) from error

    def render(self, env: MetaWorldEnv) -> Frame:
        """(H, W, 3) uint8 RGB."""
        self._update(env, marker=self.flags.goal_marker)
        flags, names = self._renderer.scene.flags, _simulator().mujoco.mjtRndFlag
        flags[names.mjRND_SHADOW] = self.flags.shadow
        flags[names.mjRND_REFLECTION] = self.flags.reflection
        return self._upright(self._renderer.render())

    def geom_ids(self, env: MetaWorldEnv) -> npt.NDArray[np.int32]:
        """(H, W) the geom seen at each pixel, -1 where there is none."""
        self._renderer.enable_segmentation_rendering()
        try:
            self._update(env, marker=False)
            ids_HW2 = self._renderer.render()
        finally:
            self._renderer.disable_segmentation_rendering()
        is_geom = ids_HW2[..., 1] == int(_simulator().mujoco.mjtObj.mjOBJ_GEOM)
        return self._upright(np.where(is_geom, ids_HW2[..., 0], -1).astype(np.int32))

    def close(self) -> None:
        """Give the OpenGL context back; later calls fail."""
        _live_renderers.discard(self)
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _update(self, env: MetaWorldEnv, *, marker: bool) -> None:
        if env.task != self.task:
            raise ConfigError(f"a renderer of {self.task!r} cannot draw {env.task!r}.", remedy="Make one per task.")
        name = env.goal_site
        self._options.sitegroup[0] = marker and name is not None
        self.model.site_group[:] = HIDDEN_GROUP
        sites_xyz = env.data.site_xpos
        before = sites_xyz.copy()
        if name is not None:
            # Meta-World leaves the marker where an earlier reset put it, so it is drawn at the target and put back.
            site = self.model.site(name).id
            self.model.site_group[site] = 0
            sites_xyz[site] = env.goal
        self._renderer.update_scene(env.data, camera=self.camera, scene_option=self._options)
        sites_xyz[:] = before

    def _upright(self, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
        turned = picture[::-1, ::-1] if self.camera in UPSIDE_DOWN_CAMERAS else picture
        return np.ascontiguousarray(turned)


def visible_geoms(model: Any) -> npt.NDArray[np.bool_]:
    """(num_geoms,) True where a shape is drawn: collision shapes and fully transparent ones are not."""
    own_alpha = model.geom_rgba[:, 3]
    plain = np.all(model.geom_rgba == DEFAULT_RGBA, axis=1) & (model.geom_matid >= 0)
    alpha = np.where(plain, model.mat_rgba[model.geom_matid, 3] if model.nmat else own_alpha, own_alpha)
    return (alpha > 0) & (model.geom_group <= 2)


_live_renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _close_at_exit(renderer: Renderer) -> None:
    """Contexts freed after the display is gone leave tracebacks behind, so they are closed before it goes."""
    if not _live_renderers:
        # Handlers run last in, first out: this one has to come after the one of the first context's display.
        atexit.unregister(_close_renderers)
        atexit.register(_close_renderers)
    _live_renderers.add(renderer)


def _close_renderers() -> None:
    for renderer in list(_live_renderers):
        renderer.close()


class _Simulator:
    """The heavy modules, imported once the OpenGL backend is chosen."""

    def __init__(self) -> None:
        select_backend()
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.mujoco = mujoco
        self.environments = ALL_V3_ENVIRONMENTS
        self.policies = ENV_POLICY_MAP


@lru_cache(maxsize=1)
def _simulator() -> _Simulator:
    return _Simulator()


@cache
def _environment_class(task: str) -> Any:
    """The task's class, compiling its XML only once per process: 12 ms an episode instead of 130."""
    mujoco = _simulator().mujoco
    base = _simulator().environments[f"{task}-v3"]

    class Cached(base):  # type: ignore[misc, valid-type]
        pristine: Any = None

        def _initialize_simulation(self) -> tuple[Any, Any]:
            kind = type(self)
            if kind.pristine is None:
                kind.pristine = mujoco.MjModel.from_xml_path(self.fullpath)
            model = copy.copy(kind.pristine)
            return model, mujoco.MjData(model)

    return Cached


def _new_environment(task: str) -> Any:
    env = _environment_class(task)()
    # What Meta-World's own goal-observable classes set; theirs also draw from the global random state.
    env._partially_observable = False
    del env.sawyer_observation_space
    env._set_task_called = True
    return env


def _pristine_model(task: str) -> Any:
    kind = _environment_class(task)
    if kind.pristine is None:
        _new_environment(task)
    return kind.pristine
