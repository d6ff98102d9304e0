"""The simulator and its pictures: equal seeds, equal episodes; up is up; markers and masks are where they belong."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from infra.errors import ConfigError, MachineError
from ingest.simulators import opengl
from ingest.simulators.masks import ARM, OBJECT, arm_geoms, label_map, moved_geoms
from ingest.simulators.metaworld import MetaWorldEnv, Renderer, RenderFlags, prepare_rendering
from ingest.simulators.sentences import GOAL_MARKER_TASKS, TASK_SENTENCES, TASKS

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", autouse=True)
def _rendering():
    prepare_rendering()


def trace(env: MetaWorldEnv, num_steps: int = 40) -> np.ndarray:
    observations = [env.observation]
    for _ in range(num_steps):
        env.step(env.oracle_action())
        observations.append(env.observation)
    return np.stack(observations)


@pytest.mark.parametrize("task", ["drawer-open", "push", "assembly"])
def test_an_episode_is_that_of_metaworlds_own_goal_observable_class(task: str):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
    env.seed(7)
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    observation, _ = env.reset()
    policy = ENV_POLICY_MAP[f"{task}-v3"]()
    expected = [observation]
    for _ in range(40):
        action = np.clip(policy.get_action(observation), -1, 1).astype(np.float32)
        observation = env.step(action)[0]
        expected.append(observation)
    assert np.array_equal(trace(MetaWorldEnv(task, 7)), np.stack(expected))


def test_a_used_environment_repeats_an_episode_to_the_last_bit_and_seeds_differ():
    env = MetaWorldEnv("push", 3)
    first, goal = trace(env), env.goal
    env.reset(4)
    other, other_goal = trace(env), env.goal
    env.reset(3)
    assert np.array_equal(trace(env), first)
    assert not np.array_equal(other, first)
    assert not np.array_equal(other_goal, goal)


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_up_is_up_and_right_is_right(camera: str):
    """The hand is moved in the world; where it must go in the picture follows from the camera's place alone."""
    env = MetaWorldEnv("reach", 0)
    with Renderer("reach", camera=camera, size=160) as renderer:
        hand = np.zeros(env.model.ngeom, bool)
        hand[[env.model.geom(name).id for name in ("rightpad_geom", "leftpad_geom")]] = True

        def place() -> tuple[np.ndarray, np.ndarray]:
            seen = np.isin(renderer.geom_ids(env), np.flatnonzero(hand))
            assert seen.any()
            return np.argwhere(seen).mean(axis=0), env.data.body("hand").xpos.copy()

        def move(action: list[float]) -> tuple[np.ndarray, np.ndarray]:
            (before, at), _ = place(), [env.step(np.array(action)) for _ in range(12)]
            after, reached = place()
            return after - before, reached - at

        view = env.data.cam(camera).xmat.reshape(3, 3)
        right = np.cross(-view[:, 2], [0.0, 0.0, 1.0])
        (rows, _), lifted = move([0, 0, 1, 0])
        assert lifted[2] > 0.03
        assert rows < -1
        for action in ([1, 0, 0, 0], [0, 1, 0, 0]):
            (_, columns), moved = move(action)
            if abs(moved @ right) > 0.02:
                assert np.sign(columns) == np.sign(moved @ right)


def plain_picture(env: MetaWorldEnv, size: int) -> np.ndarray:
    """MuJoCo's own renderer on the environment's own model, turned upright."""
    import mujoco

    env.model.vis.quality.offsamples = 0
    options = mujoco.MjvOption()
    options.sitegroup[:] = 0
    with mujoco.Renderer(env.model, size, size) as renderer:
        renderer.update_scene(env.data, camera="corner4", scene_option=options)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return np.rot90(renderer.render(), 2)


def test_one_renderer_serves_many_environments():
    environments = [MetaWorldEnv("drawer-open", seed) for seed in (0, 1, 2)]
    for env in environments:
        trace(env, 30)
    with Renderer("drawer-open", size=64) as shared:
        pictures = [shared.render(env) for env in environments]
    for env, picture in zip(environments, pictures, strict=True):
        assert np.array_equal(plain_picture(env, 64), picture)
    assert not np.array_equal(pictures[0], pictures[1])


def changed_by_goal(task: str, flags: RenderFlags, size: int = 128) -> int:
    """Pixels that change when nothing but the goal moves: the part of the reset's random vector that is the goal."""
    pictures = []
    env = MetaWorldEnv(task, 0)
    inner = env._env
    start, goals = inner._last_rand_vec.copy(), []
    for seed in range(12):
        env.reset(seed)
        goal = inner._last_rand_vec[3:].copy()
        if np.linalg.norm(goal[:2] - start[:2]) > 0.16:  # nearer ones are drawn again, which a frozen draw never ends
            goals.append(goal)
    assert len(goals) > 1
    with Renderer(task, size=size, flags=flags) as renderer:
        for goal in goals[:2]:
            inner._freeze_rand_vec, inner._last_rand_vec = True, np.concatenate([start[:3], goal])
            inner.reset()
            pictures.append(renderer.render(env).astype(int))
    return int((np.abs(pictures[0] - pictures[1]).max(axis=-1) > 8).sum())


def goal_marker_is_needed_and_seen(task: str) -> bool:
    hidden = changed_by_goal(task, RenderFlags(goal_marker=False))
    shown = changed_by_goal(task, RenderFlags(goal_marker=True))
    return hidden <= 3 < shown


@pytest.mark.parametrize("task", ["reach", "push", "pick-out-of-hole"])
def test_the_marker_is_drawn_where_nothing_else_shows_the_goal(task: str):
    assert goal_marker_is_needed_and_seen(task)
    assert RenderFlags.for_task(task).goal_marker


@pytest.mark.parametrize("task", ["soccer", "shelf-place", "basketball"])
def test_no_marker_where_the_scene_shows_the_goal(task: str):
    assert changed_by_goal(task, RenderFlags(goal_marker=False)) > 10
    assert not RenderFlags.for_task(task).goal_marker


@pytest.mark.slow
def test_the_whole_marker_table():
    assert {task for task in GOAL_MARKER_TASKS if not goal_marker_is_needed_and_seen(task)} == set()
    assert set(TASKS) == set(TASK_SENTENCES)


def test_masks_are_the_pixels_that_change_when_the_object_is_painted():
    env = MetaWorldEnv("drawer-close", 0)
    positions, rotations = [env.data.geom_xpos.copy()], [env.data.geom_xmat.copy()]
    trace(env, 70)
    positions.append(env.data.geom_xpos.copy())
    rotations.append(env.data.geom_xmat.copy())
    thing = moved_geoms(env.model, np.stack(positions), np.stack(rotations))
    arm = arm_geoms(env.model)
    assert not (thing & arm).any()
    assert {env.model.body(env.model.geom_bodyid[geom]).name for geom in np.flatnonzero(thing)} == {"drawer_link"}
    with Renderer("drawer-close", size=256) as renderer:
        labels = label_map(renderer.geom_ids(env), arm=arm, thing=thing)
        picture = renderer.render(env).astype(int)
        for value, geoms in ((OBJECT, thing), (ARM, arm)):
            materials, colours = renderer.model.geom_matid.copy(), renderer.model.geom_rgba.copy()
            renderer.model.geom_matid[geoms], renderer.model.geom_rgba[geoms] = -1, (1, 0, 1, 1)
            changed = np.abs(renderer.render(env).astype(int) - picture).max(axis=-1) > 0
            renderer.model.geom_matid[:], renderer.model.geom_rgba[:] = materials, colours
            mask = labels == value
            assert mask.sum() > 200
            assert np.array_equal(changed, mask)


def test_a_renderer_refuses_another_task():
    with Renderer("reach", size=32) as renderer, pytest.raises(ConfigError, match="'push'"):
        renderer.render(MetaWorldEnv("push", 0))


def test_without_opengl_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(opengl, "_works", lambda backend: False)
    with pytest.raises(MachineError, match=r"apt-get install .*libegl1"):
        prepare_rendering()
    assert os.environ.pop("MUJOCO_GL") == "disable"


def test_an_optimiser_survives_a_renderer():
    """Triton after Mesa is a segmentation fault; preparing imports it before."""
    code = (
        "from ingest.simulators.metaworld import MetaWorldEnv, Renderer, prepare_rendering\n"
        "prepare_rendering()\n"
        "Renderer('reach', size=32).render(MetaWorldEnv('reach', 0))\n"
        "import torch\n"
        "weights = torch.nn.Parameter(torch.ones(2))\n"
        "weights.sum().backward()\n"
        "torch.optim.AdamW([weights]).step()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
