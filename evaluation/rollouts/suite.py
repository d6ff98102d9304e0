"""The rollout suite: a policy and its control arms on equal tasks and seeds, pooled with intervals.

Simulators run in processes of their own, the policies here, loaded once. Every episode is recorded when it ends; a
killed evaluation plays the missing ones and ends with the same `result.json`, whatever the number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from evaluation.result import RESULT_NAME, EvaluationResult, Item
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
from evaluation.rollouts.environments import Actions, MakeMetaWorld
from evaluation.rollouts.fleet import Fleet
from evaluation.rollouts.latency import LATENCY_NAME, ArmTimings, in_words, single
from evaluation.rollouts.loop import Batch, cameras_of, run_batch
from evaluation.rollouts.player import Rollout, Rules, Scene
from evaluation.rollouts.policies import is_served, open_policy, policy_digest
from evaluation.rollouts.records import SUCCESS_EVER, Records
from evaluation.rollouts.scores import differences, scores_of
from evaluation.suites import ROLLOUTS, claim_output, finished_result
from infra.errors import ConfigError
from infra.faults import fault_point
from infra.storage import join, write_json
from ingest.reader import ShardDataset
from ingest.simulators.metaworld import ACTION_DIM, simulator_versions
from training.protocols import Policy

log = logging.getLogger(__name__)

POLICY = "policy"


def run(config: RolloutsConfig) -> EvaluationResult:
    """Roll out and write `result.json` last; a finished output is read, not redone.

    Raises `InputError` if the output holds the result of another config or model.
    """
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    known = {"model": config.policy, "model_digest": policy_digest(config.policy)}
    if (done := finished_result(config.output, **known, suite_version=suite_version(config))) is not None:
        if is_served(config.policy):
            log.warning(
                "%s: a served policy cannot be seen; if its weights changed, tell the two apart with ?name=NAME",
                config.policy,
            )
        return done
    session = _Session(config)
    session.play()
    result = session.result()
    write_json(join(config.output, LATENCY_NAME), session.latency())
    write_json(join(config.output, RESULT_NAME), result.to_json())
    return result


@dataclass
class _Session:
    config: RolloutsConfig
    timings: dict[str, ArmTimings] = field(default_factory=dict)
    _single: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.version = suite_version(config)
        self.records = Records(config.output, suite_version=self.version, clip_stride=config.clip_stride)
        if len(self.records):
            log.info("resuming: %d episodes are recorded", len(self.records))
        self._demonstrations, self.data_digest = _demonstrations(config)
        self._policies = {url: open_policy(url) for url in dict.fromkeys(_addresses(config))}
        for name in self.names:
            self._arm(name, config.tasks[0])  # one that lacks what it needs is refused before anything is played

    @property
    def names(self) -> tuple[str, ...]:
        """The policy first, then the policies to report beside it, then the control arms."""
        return (POLICY, *self.config.other_policies, *self.config.arms)

    def play(self) -> None:
        """Every episode that is not recorded yet."""
        config = self.config
        rules = Rules(config.max_steps, config.stop_on_success, config.clip_stride)
        make = MakeMetaWorld(config.camera, config.size, config.cameras, trains_here=config.workers == 1)
        with Fleet(make, processes=config.workers) as fleet:
            for task, seeds in self._groups():
                for name in self.names:
                    batch = self._batch(name, task, seeds)
                    if batch.missing:
                        self._play(fleet, name, batch, rules)
                        log.info("%s", self._in_words(name, task, seeds))
            self._ask_alone(fleet, rules)

    def result(self) -> EvaluationResult:
        """All records, in the order of the config."""
        config, names = self.config, self.names
        items = {
            name: tuple(self.records.get(name, task, seed).item for task in config.tasks for seed in config.seeds)
            for name in names
        }
        mine = items.pop(POLICY)
        exports = {policy.digest for policy in self._policies.values()}
        return EvaluationResult(
            suite=config.suite,
            suite_version=self.version,
            model=config.policy,
            model_digest=self._policies[config.policy].digest,
            data_digest=self.data_digest,
            code_version=version("foreframe"),
            primary_metric=SUCCESS_EVER,
            seeds=config.seeds,
            items=mine,
            scores=scores_of(mine) | differences(mine, items),
            arms=items,
            arm_scores={name: scores_of(arm) for name, arm in items.items()},
            artefacts={**self._clips(), "latency": LATENCY_NAME},
            inputs=tuple(sorted(exports | ({self.data_digest} if self.data_digest else set()))),
        )

    def latency(self) -> dict[str, Any]:
        """Times of this execution by arm, and of the policy asked by one robot."""
        return {"single": self._single, "arms": {name: timings.record() for name, timings in self.timings.items()}}

    def _play(self, fleet: Fleet, name: str, batch: Batch, rules: Rules) -> None:
        def keep(rollout: Rollout) -> None:
            self.records.add(name, batch.task, rollout, digest=self._arm(name, batch.task).digest)
            fault_point("rollouts.after_episode", f"{name}/{batch.task}/{rollout.seed}")

        run_batch(
            fleet,
            self._arm(name, batch.task),
            batch,
            rules=rules,
            on_ended=keep,
            timings=self.timings.setdefault(name, ArmTimings()),
        )

    def _groups(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for task in self.config.tasks:
            for seeds in self.config.groups:
                yield task, seeds

    def _batch(self, name: str, task: str, seeds: tuple[int, ...]) -> Batch:
        recorded = self.records.played(name, task, seeds, digest=self._arm(name, task).digest)
        if name == OTHER_EPISODE and len(recorded) < len(seeds):
            recorded = frozenset()  # its episodes look at each other's pictures: all of them run, or none
        filmed = frozenset(self.config.seeds[: self.config.num_clips]) & frozenset(seeds)
        return Batch(task, seeds, self.config.num_rows, recorded, filmed)

    def _arm(self, name: str, task: str) -> Policy | Expert:
        config = self.config
        urls = {POLICY: config.policy, PROPRIOCEPTION: config.proprioception_policy, **config.other_policies}
        if name in urls:
            policy = self._policies[urls[name]]
            if name == PROPRIOCEPTION and policy.needs_images:
                raise ConfigError(f"{urls[name]} is a policy that looks at pictures.")
            return policy
        if name == MEAN_DEMONSTRATION:
            return ReplayedActions(self._demonstrations[task])
        if name == OTHER_EPISODE:
            return OtherEpisode(self._policies[config.policy])
        assert name in (RANDOM_ACTIONS, ORACLE), name
        return Expert() if name == ORACLE else RandomActions(action_dim=ACTION_DIM)

    def _ask_alone(self, fleet: Fleet, rules: Rules) -> None:
        """What one robot would wait for the policy; the picture is drawn where the episodes are played."""
        config, policy = self.config, self._policies[self.config.policy]
        scene = Scene(config.tasks[0], config.seeds[:1], (0,), cameras=cameras_of(policy))
        (news,) = fleet.start(scene, rules)
        assert news.observation is not None, "an episode has a first step"
        self._single = single(policy, news.observation)
        log.info("%s", in_words(self._single))

    def _clips(self) -> dict[str, str]:
        """Clips of the policy first: a report with little room shows the first ones."""
        found = {}
        for name in self.names:
            for task in self.config.tasks:
                for seed in self.config.seeds:
                    record = self.records.get(name, task, seed)
                    if record.clip:
                        outcome = "solved" if record.item.metrics[SUCCESS_EVER] else "not solved"
                        found[f"{task}, {name}, seed {seed}: {outcome}"] = record.clip
        return found

    def _in_words(self, name: str, task: str, seeds: tuple[int, ...]) -> str:
        items: list[Item] = [self.records.get(name, task, seed).item for seed in seeds]
        return f"{task}: {name} {sum(int(item.metrics[SUCCESS_EVER]) for item in items)}/{len(items)}"


def suite_version(config: RolloutsConfig) -> str:
    """Two results compare only if this is equal: tasks, seeds, length, pictures, and the simulator that drew them."""
    fields = (
        "tasks", "first_seed", "num_seeds", "max_steps", "stop_on_success", "size", "camera", "cameras", "batch_size",
    )  # fmt: skip
    values = config.to_json()
    return ROLLOUTS.protocol_version({**{name: values[name] for name in fields}, "versions": simulator_versions()})


def _addresses(config: RolloutsConfig) -> tuple[str, ...]:
    control = (config.proprioception_policy,) if PROPRIOCEPTION in config.arms else ()
    return (config.policy, *config.other_policies.values(), *control)


def _demonstrations(config: RolloutsConfig) -> tuple[dict[str, Actions], str]:
    """(mean demonstration of each task where an arm needs it, version of the episode data set)."""
    if not config.episodes:
        return {}, ""
    episodes = ShardDataset(config.episodes)
    if MEAN_DEMONSTRATION not in config.arms:
        return {}, episodes.version
    return mean_demonstrations(episodes, config.tasks), episodes.version
