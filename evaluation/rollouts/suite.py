"""The rollout suite: a policy and its control arms on equal tasks and seeds, pooled with Wilson intervals."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from evaluation.result import RESULT_NAME, EvaluationResult, Item, Score
from evaluation.rollouts.arms import Expert, OtherEpisode, RandomActions, ReplayedActions, mean_demonstrations
from evaluation.rollouts.config import (
    MEAN_DEMONSTRATION,
    ORACLE,
    OTHER_EPISODE,
    PLACE_FIELDS,
    PROPRIOCEPTION,
    RANDOM_ACTIONS,
    RolloutsConfig,
)
from evaluation.rollouts.environments import Actions, BatchEnvironment, MetaWorldBatch
from evaluation.rollouts.loop import SUCCESS_EVER, SUCCESS_LAST, Rollout, clip_fps, items_of, run_batch
from evaluation.statistics import wilson_interval
from evaluation.suites import claim_output
from infra.digests import sha256_json
from infra.errors import ConfigError, InputError
from infra.media_encode import encode_video
from infra.storage import exists, join, read_json, write_bytes, write_json
from ingest.reader import ShardDataset
from ingest.simulators.metaworld import CONTROL_HZ, prepare_rendering, simulator_versions
from ingest.simulators.workers import WorkerPool
from training.export import load_policy, read_record
from training.protocols import Policy

log = logging.getLogger(__name__)

SUITE_VERSION = "1"
POLICY = "policy"
CLIP_CRF = 23


@dataclass(frozen=True)
class _TaskOrder:
    config: RolloutsConfig
    task: str
    mean_demonstration: Actions | None


@dataclass(frozen=True)
class _TaskOutcome:
    task: str
    items: dict[str, tuple[Item, ...]]  # by arm
    clips: dict[str, dict[str, str]]  # by arm: title -> path relative to the output
    digests: dict[str, str]


def run(config: RolloutsConfig) -> EvaluationResult:
    """Roll out and write `result.json` last; a finished output is read, not redone.

    Raises `InputError` if the output holds the result of another config.
    """
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    done = join(config.output, RESULT_NAME)
    if exists(done):
        return _finished(config, EvaluationResult.parse(read_json(done)))
    prepare_rendering()
    demonstrations, data_digest = _demonstrations(config)
    orders = [_TaskOrder(config, task, demonstrations.get(task)) for task in config.tasks]
    outcomes: dict[str, _TaskOutcome] = {}
    with WorkerPool(min(config.workers, len(orders))) as pool:
        for outcome in pool.map(_run_task, orders):
            outcomes[outcome.task] = outcome
            log.info("%s: %s", outcome.task, _in_words(outcome.items))
    result = _pooled(config, [outcomes[task] for task in config.tasks], data_digest)
    write_json(done, result.to_json())
    return result


def _finished(config: RolloutsConfig, result: EvaluationResult) -> EvaluationResult:
    digest = str(read_record(config.policy)["digest"])
    if digest != result.model_digest:
        raise InputError(
            f"{config.output} rates policy {result.model_digest[:12]}, but {config.policy} now is {digest[:12]}.",
            remedy="Choose another output folder.",
        )
    log.info("%s is complete: nothing to roll out", config.output)
    return result


def scores_of(items: Iterable[Item]) -> dict[str, Score]:
    """Success shares with Wilson intervals: pooled under the metric's name, per task under `metric/task`."""
    groups: dict[str, list[float]] = {}
    for item in items:
        for metric in (SUCCESS_EVER, SUCCESS_LAST):
            if metric in item.metrics:
                groups.setdefault(metric, []).append(item.metrics[metric])
                groups.setdefault(f"{metric}/{item.stratum}", []).append(item.metrics[metric])
    return {name: _share(values) for name, values in sorted(groups.items(), key=lambda group: "/" in group[0])}


def _share(values: list[float]) -> Score:
    successes, count = sum(value > 0.5 for value in values), len(values)
    low, high = wilson_interval(successes, count)
    return Score(value=successes / count, low=low, high=high, count=count, successes=successes, method="wilson")


def _run_task(order: _TaskOrder) -> _TaskOutcome:
    """Everything of one task, in a process of its own when there are several."""
    config = order.config
    prepare_rendering()
    if config.workers > 1:
        torch.set_num_threads(1)
    environment = MetaWorldBatch(order.task, config.seeds, camera=config.camera, size=config.size)
    outcome = _TaskOutcome(order.task, {}, {}, {})
    try:
        for name, policy in _arms(order, environment).items():
            rollouts = run_batch(
                environment,
                policy,
                max_steps=config.max_steps,
                stop_on_success=config.stop_on_success,
                num_clips=config.num_clips,
                clip_stride=config.clip_stride,
            )
            outcome.items[name] = items_of(rollouts, order.task)
            outcome.digests[name] = policy.digest
            outcome.clips[name] = _store_clips(config, order.task, name, rollouts)
    finally:
        environment.close()
    return outcome


def _arms(order: _TaskOrder, environment: BatchEnvironment) -> dict[str, Policy]:
    config = order.config
    arms: dict[str, Policy] = {POLICY: _policy(config.policy)}
    for name, url in config.other_policies.items():
        arms[name] = _policy(url)
    for name in config.arms:
        arms[name] = _control(name, order, environment)
    return arms


def _control(name: str, order: _TaskOrder, environment: BatchEnvironment) -> Policy:
    if name == RANDOM_ACTIONS:
        return RandomActions(environment.seeds, action_dim=environment.action_dim)
    if name == MEAN_DEMONSTRATION:
        assert order.mean_demonstration is not None
        return ReplayedActions(order.mean_demonstration)
    if name == PROPRIOCEPTION:
        policy = _policy(order.config.proprioception_policy)
        if policy.needs_images:
            raise ConfigError(f"{order.config.proprioception_policy} is a policy that looks at pictures.")
        return policy
    if name == OTHER_EPISODE:
        return OtherEpisode(_policy(order.config.policy))
    assert name == ORACLE, name
    return Expert(environment)


@lru_cache(maxsize=8)
def _policy(url: str) -> Policy:
    return load_policy(url)


def _demonstrations(config: RolloutsConfig) -> tuple[dict[str, Actions], str]:
    """(mean demonstration of each task where an arm needs it, version of the episode data set)."""
    if not config.episodes:
        return {}, ""
    episodes = ShardDataset(config.episodes)
    if MEAN_DEMONSTRATION not in config.arms:
        return {}, episodes.version
    return mean_demonstrations(episodes, config.tasks), episodes.version


def _store_clips(config: RolloutsConfig, task: str, arm: str, rollouts: list[Rollout]) -> dict[str, str]:
    fps = clip_fps(CONTROL_HZ, config.clip_stride)
    stored = {}
    for rollout in rollouts:
        if not rollout.frames:
            continue
        path = f"clips/{task}/{arm}-{rollout.seed}.mp4"
        with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
            local = Path(folder) / "clip.mp4"
            encode_video(rollout.frames, local, fps=fps, crf=CLIP_CRF)
            write_bytes(join(config.output, path), local.read_bytes())
        outcome = "solved" if rollout.ever else "not solved"
        stored[f"{task}, {arm}, seed {rollout.seed}: {outcome}"] = path
    return stored


def _pooled(config: RolloutsConfig, outcomes: list[_TaskOutcome], data_digest: str) -> EvaluationResult:
    names = list(outcomes[0].items)
    items = {name: tuple(item for outcome in outcomes for item in outcome.items[name]) for name in names}
    # Clips of the policy first: a report with little room shows the first ones.
    clips = {title: path for name in names for outcome in outcomes for title, path in outcome.clips[name].items()}
    digests = outcomes[0].digests
    exports = {digests[POLICY]} | {
        digests[name] for name in (*config.other_policies, PROPRIOCEPTION) if name in digests
    }
    return EvaluationResult(
        suite=config.suite,
        suite_version=f"{SUITE_VERSION}-{_protocol_digest(config)[:12]}",
        model=config.policy,
        model_digest=digests[POLICY],
        data_digest=data_digest,
        code_version=version("foreframe"),
        primary_metric=SUCCESS_EVER,
        seeds=config.seeds,
        items=items.pop(POLICY),
        scores={},
        arms=items,
        artefacts=clips,
        inputs=tuple(sorted(exports | ({data_digest} if data_digest else set()))),
    ).model_copy(
        update={
            "scores": scores_of(item for outcome in outcomes for item in outcome.items[POLICY]),
            "arm_scores": {name: scores_of(arm) for name, arm in items.items()},
        }
    )


def _protocol_digest(config: RolloutsConfig) -> str:
    """Two results compare only if this is equal: tasks, seeds, length, pictures, and the simulator that drew them."""
    fields = ("tasks", "first_seed", "num_seeds", "max_steps", "stop_on_success", "size", "camera")
    values = config.to_json()
    return sha256_json({**{name: values[name] for name in fields}, "versions": simulator_versions()})


def _in_words(items: dict[str, tuple[Item, ...]]) -> str:
    return ", ".join(
        f"{name} {sum(int(item.metrics[SUCCESS_EVER]) for item in arm)}/{len(arm)}" for name, arm in items.items()
    )
