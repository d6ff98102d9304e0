"""Demonstrations as source episodes: `<task>/seed-00012.mp4`, `.npz` and `.json`, and `corpus.json` written last.

Frame, action and proprioception t belong together: what was seen and felt before the step, and what the oracle does
there. Every file is a function of config and seed, and of the versions it names.
"""

from __future__ import annotations

import io
import logging
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.config import Config
from infra.digests import pretty_json, sha256_bytes
from infra.errors import DataError, InputError
from infra.faults import fault_point
from infra.media_encode import encode_video
from infra.storage import create_only, exists, join, read_json, write_bytes, write_json
from ingest.simulators.config import PLACE_FIELDS, SimulateConfig
from ingest.simulators.damage import PlantedFile, plant
from ingest.simulators.metaworld import MetaWorldEnv, Renderer, RenderFlags, prepare_rendering, simulator_versions
from ingest.simulators.sentences import TASK_SENTENCES
from ingest.simulators.workers import WorkerPool

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
CORPUS_NAME = "corpus.json"
CONFIG_NAME = "config.json"
MAX_ATTEMPTS_PER_EPISODE = 5  # the worst oracle succeeds on three seeds of four


class TaskSummary(Config):
    """How one task's demonstrations came about."""

    text: str
    num_episodes: int
    num_frames: int
    num_attempts: int
    failed_seeds: tuple[int, ...]
    oracle_rate: float


class Corpus(Config):
    """`corpus.json`: what lies in the folder, written when everything does."""

    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    versions: dict[str, str]
    tasks: dict[str, TaskSummary]
    num_episodes: int
    num_frames: int
    num_attempts: int
    oracle_rate: float
    damage: tuple[PlantedFile, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One seed of one task to try."""

    config: SimulateConfig
    task: str
    seed: int

    @property
    def stem(self) -> str:
        """Url of the episode's files without their suffix."""
        return join(self.config.output, self.task, f"seed-{self.seed:05d}")


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt; 0 frames: the oracle failed."""

    task: str
    seed: int
    num_frames: int


@dataclass(frozen=True)
class Episode:
    """T steps: frames (T, H, W, 3) uint8, actions and executed actions and proprioception (T, 4), success (T,)."""

    frames: npt.NDArray[np.uint8]
    arrays: dict[str, npt.NDArray[Any]]
    first_success: int | None  # index of the step after which the task first counted as solved


def run(config: SimulateConfig) -> Corpus:
    """Make the corpus, or find it made; resumes after a kill. Raises `InputError` if the folder holds another one."""
    _claim(config)
    done = join(config.output, CORPUS_NAME)
    if exists(done):
        log.info("%s is complete: nothing to simulate", config.output)
        return Corpus.parse(read_json(done))
    prepare_rendering(torch_first=config.workers == 1)
    try:
        with WorkerPool(config.workers) as pool:
            outcomes = _attempt_all(config, pool)
    finally:
        _stage.cache_clear()
    corpus = _summary(config, outcomes)
    if config.damage:
        corpus = corpus.model_copy(update={"damage": plant(config.output, seed=config.damage_seed)})
    write_json(done, corpus.to_json())
    log.info("%d episodes, %d frames, oracle rate %.3f", corpus.num_episodes, corpus.num_frames, corpus.oracle_rate)
    return corpus


def attempt(order: Attempt) -> Outcome:
    """Try one seed and store the episode if it succeeds; an episode already stored is left alone."""
    config = order.config
    record_url = f"{order.stem}.json"
    if exists(record_url):
        return Outcome(order.task, order.seed, int(read_json(record_url)["num_frames"]))
    prepare_rendering(torch_first=config.workers == 1)
    env, renderer = _stage(order.task, config.camera, config.size, config.render_flags(order.task))
    env.reset(order.seed)
    episode = demonstrate(env, renderer, config, noise_rng=_noise_rng(order.task, order.seed))
    if episode.first_success is None:
        return Outcome(order.task, order.seed, 0)
    _store(order, episode, renderer.flags)
    return Outcome(order.task, order.seed, len(episode.frames))


def demonstrate(
    env: MetaWorldEnv, renderer: Renderer, config: SimulateConfig, *, noise_rng: np.random.Generator
) -> Episode:
    """One oracle episode, ended `keep_after_success` frames after its first success or at `max_steps`."""
    frames, actions, executed, proprioception, success = [], [], [], [], []
    first_success: int | None = None
    for step in range(config.max_steps):
        frames.append(renderer.render(env))
        proprioception.append(env.proprioception)
        clean = env.oracle_action()
        noisy = clean.copy()
        noisy[:3] += noise_rng.normal(0.0, config.noise, 3).astype(np.float32)
        noisy = np.clip(noisy, -1.0, 1.0)
        actions.append(clean)
        executed.append(noisy)
        success.append(env.step(noisy))
        if first_success is None and success[-1]:
            first_success = step
        if first_success is not None and step >= first_success + config.keep_after_success:
            break
    arrays = {
        "actions": np.stack(actions),
        "executed_actions": np.stack(executed),
        "proprioception": np.stack(proprioception),
        "success": np.array(success),
        "timestamps_s": np.arange(len(frames), dtype=np.float64) / config.fps,
    }
    return Episode(np.stack(frames), arrays, first_success)


def _attempt_all(config: SimulateConfig, pool: WorkerPool) -> list[Outcome]:
    """The first `episodes` successes of each task. Each wave tries as many seeds as are missing, so none is surplus."""
    outcomes: list[Outcome] = []
    next_seed = dict.fromkeys(config.tasks, config.first_seed)
    missing = dict.fromkeys(config.tasks, config.episodes)
    while any(missing.values()):
        wave = []
        for task, count in missing.items():
            wave += [Attempt(config, task, next_seed[task] + i) for i in range(count)]
            next_seed[task] += count
            _check_hope(config, task, next_seed[task] - config.first_seed)
        for outcome in pool.map(attempt, wave):
            outcomes.append(outcome)
            missing[outcome.task] -= outcome.num_frames > 0
            if len(outcomes) % 25 == 0:
                log.info("%d attempts, %d episodes missing", len(outcomes), sum(missing.values()))
    return sorted(outcomes, key=lambda outcome: (outcome.task, outcome.seed))


def _check_hope(config: SimulateConfig, task: str, num_attempts: int) -> None:
    if num_attempts > MAX_ATTEMPTS_PER_EPISODE * config.episodes:
        raise DataError(
            f"the oracle of {task!r} fails on most seeds with noise {config.noise} and {config.max_steps} steps.",
            remedy="Lower the noise or raise max_steps.",
        )


def _store(order: Attempt, episode: Episode, flags: RenderFlags) -> None:
    """Video, arrays, and the record last: an episode without its record does not exist."""
    config = order.config
    with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
        local = Path(folder) / "episode.mp4"
        encode_video(episode.frames, local, fps=config.fps, crf=config.crf, gop=config.gop)
        video = local.read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **episode.arrays)
    arrays = buffer.getvalue()
    record = {
        "schema_version": SCHEMA_VERSION,
        "task": order.task,
        "text": TASK_SENTENCES[order.task],
        "seed": order.seed,
        "success": True,
        "first_success": episode.first_success,
        "num_frames": len(episode.frames),
        "fps": config.fps,
        "camera": config.camera,
        "size": config.size,
        "render": flags.to_json(),
        "noise": config.noise,
        "episode_digest": config.episode_digest(),
        "versions": simulator_versions(),
        "sha256": {"mp4": sha256_bytes(video), "npz": sha256_bytes(arrays)},
    }
    write_bytes(f"{order.stem}.mp4", video)
    write_bytes(f"{order.stem}.npz", arrays)
    fault_point("simulate.before-record", order.stem)
    write_json(f"{order.stem}.json", record)


def _claim(config: SimulateConfig) -> None:
    """A folder holds one corpus: its config is there before the first episode."""
    wanted = {key: value for key, value in config.to_json().items() if key not in PLACE_FIELDS}
    url = join(config.output, CONFIG_NAME)
    if create_only(url, pretty_json(wanted)):
        return
    found = read_json(url)
    changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if changed:
        raise InputError(
            f"{config.output} holds a corpus made with another config (different: {', '.join(changed)}).",
            remedy="Choose another output folder, or remove this one.",
        )


def _summary(config: SimulateConfig, outcomes: list[Outcome]) -> Corpus:
    tasks = {}
    for task in config.tasks:
        mine = [outcome for outcome in outcomes if outcome.task == task]
        kept = [outcome for outcome in mine if outcome.num_frames]
        tasks[task] = TaskSummary(
            text=TASK_SENTENCES[task],
            num_episodes=len(kept),
            num_frames=sum(outcome.num_frames for outcome in kept),
            num_attempts=len(mine),
            failed_seeds=tuple(outcome.seed for outcome in mine if not outcome.num_frames),
            oracle_rate=len(kept) / len(mine),
        )
    num_episodes = sum(task.num_episodes for task in tasks.values())
    num_attempts = sum(task.num_attempts for task in tasks.values())
    return Corpus(
        config={key: value for key, value in config.to_json().items() if key not in PLACE_FIELDS},
        versions=simulator_versions(),
        tasks=tasks,
        num_episodes=num_episodes,
        num_frames=sum(task.num_frames for task in tasks.values()),
        num_attempts=num_attempts,
        oracle_rate=num_episodes / num_attempts,
    )


def _noise_rng(task: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *task.encode()])


@lru_cache(maxsize=1)
def _stage(task: str, camera: str, size: int, flags: RenderFlags) -> tuple[MetaWorldEnv, Renderer]:
    """This process's environment and renderer of the task at hand."""
    return MetaWorldEnv(task, seed=0), Renderer(task, camera=camera, size=size, flags=flags)
