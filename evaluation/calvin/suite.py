"""The CALVIN suite: how many of five subtasks in a row a policy solves, over the published chains.

A chain's record is written when the chain ends, so a killed evaluation goes on behind the last one.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from evaluation.calvin.actors import Actor, LocalActor, ProcessActor
from evaluation.calvin.chains import Chain, ChainFile, read_chains
from evaluation.calvin.config import CHAIN_LENGTH, CONTROL_HZ, PLACE_FIELDS, CalvinConfig
from evaluation.calvin.environment import Benchmark, Checkout
from evaluation.calvin.loop import ChainLoop, Played, Rules
from evaluation.result import RESULT_NAME, EvaluationResult, Item, Score
from evaluation.rollouts.latency import LATENCY_NAME, in_words, single
from evaluation.rollouts.policies import open_policy, policy_digest
from evaluation.statistics import stratified_bootstrap, wilson_interval
from evaluation.suites import CALVIN, claim_output, finished_result
from infra.config import Config
from infra.digests import sha256_json, short
from infra.errors import InputError
from infra.faults import fault_point
from infra.media_encode import encode_video
from infra.storage import exists, join, read_json, write_bytes, write_json
from training.protocols import Policy

log = logging.getLogger(__name__)

LENGTH = CALVIN.primary_metric
STRATUM = "chains"
CLIP_CRF = 23


class ChainRecord(Config):
    """What is kept of a chain: the tasks solved in a row and the steps of every task that was tried."""

    item: Item
    clip: str = ""
    policy_digest: str
    suite_version: str


def run(config: CalvinConfig) -> EvaluationResult:
    """Evaluate the policy at `config.policy` in the user's checkout; a finished output is read, not redone.

    Raises `InputError` if the output holds another evaluation or the checkout is none, `MachineError` if a package
    that CALVIN needs is missing or its process died.
    """
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    benchmark = Checkout.of(config)
    protocol = CALVIN.protocol_version(_protocol(config, read_chains(), benchmark.sentences(), benchmark))
    known = {"model": config.policy, "model_digest": policy_digest(config.policy)}
    if found := finished_result(config.output, **known, suite_version=protocol):
        return found
    return evaluate(config, open_policy(config.policy), benchmark)


def evaluate(config: CalvinConfig, policy: Policy, benchmark: Benchmark) -> EvaluationResult:
    """`run` for a loaded policy and any benchmark of CALVIN's form. `result.json` is written last."""
    file = read_chains()
    chains, sentences = file.chains[: config.sequences], benchmark.sentences()
    if missing := sorted({task for chain in chains for task in chain.tasks} - sentences.keys()):
        raise InputError(f"the benchmark has no sentence for {', '.join(missing)}.", remedy="Check the annotations.")
    suite_version = CALVIN.protocol_version(_protocol(config, file, sentences, benchmark))
    keeper = _Keeper(config, policy.digest, suite_version)
    records = {chain.number: record for chain in chains if (record := keeper.load(chain))}

    def keep(played: Played) -> None:
        records[played.chain.number] = keeper.save(played)
        log.info("%s: %d solved, %d of %d chains", played.chain.item_id, played.num_solved, len(records), len(chains))
        fault_point("calvin.after_chain", played.chain.item_id)

    loop = ChainLoop(policy, Rules(sentences, config.max_steps, config.batch_size, config.seed))
    began = time.perf_counter()
    loop.run(
        [chain for chain in chains if chain.number not in records],
        open_actor=lambda chain: _actor(config, benchmark, chain),
        num_places=max(config.processes, 1),
        on_played=keep,
    )
    result = _result(config, [records[chain.number] for chain in chains], policy.digest, suite_version, file)
    if loop.shown is not None:
        loop.timings.wall_s = time.perf_counter() - began
        alone = single(policy, loop.shown)
        log.info("%s", in_words(alone))
        write_json(join(config.output, LATENCY_NAME), {"single": alone, "arms": {"policy": loop.timings.record()}})
    write_json(join(config.output, RESULT_NAME), result.to_json())
    _log_summary(result)
    return result


def _actor(config: CalvinConfig, benchmark: Benchmark, chain: Chain) -> Actor:
    stride = config.clip_stride if chain.number < config.num_clips else 0
    kind = ProcessActor if config.processes else LocalActor
    return kind(benchmark, chain, clip_stride=stride)


class _Keeper:
    """Records of chains in the output."""

    def __init__(self, config: CalvinConfig, policy_digest: str, suite_version: str) -> None:
        self._output, self._clip_stride = config.output, config.clip_stride
        self._policy_digest, self._suite_version = policy_digest, suite_version

    def load(self, chain: Chain) -> ChainRecord | None:
        """A finished chain, None when there is none; `InputError` when another policy or benchmark made it."""
        place = self._place(chain)
        if not exists(place):
            return None
        record = ChainRecord.parse(read_json(place))
        for name, found, wanted in (
            ("policy", short(record.policy_digest), short(self._policy_digest)),
            ("protocol", record.suite_version, self._suite_version),
        ):
            if found != wanted:
                raise InputError(
                    f"{self._output} holds chains of {name} {found}, this is {name} {wanted}.",
                    remedy="Choose another output folder.",
                )
        return record

    def save(self, played: Played) -> ChainRecord:
        """Write a chain's clip, then its record."""
        record = ChainRecord(
            item=item_of(played),
            clip=self._store_clip(played),
            policy_digest=self._policy_digest,
            suite_version=self._suite_version,
        )
        write_json(self._place(played.chain), record.to_json())
        return record

    def _place(self, chain: Chain) -> str:
        return join(self._output, "chains", f"chain-{chain.number:05d}.json")

    def _store_clip(self, played: Played) -> str:
        if not played.frames:
            return ""
        path = f"clips/chain-{played.chain.number:05d}.mp4"
        with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
            local = Path(folder) / "clip.mp4"
            encode_video(played.frames, local, fps=CONTROL_HZ / self._clip_stride, crf=CLIP_CRF)
            write_bytes(join(self._output, path), local.read_bytes())
        return path


def item_of(played: Played) -> Item:
    """The record of `result.json`: tasks solved in a row, `success_K` for K in a row, and the steps taken."""
    solved = played.num_solved
    successes = {f"success_{count}": float(solved >= count) for count in range(1, CHAIN_LENGTH + 1)}
    return Item(
        item_id=played.chain.item_id,
        stratum=STRATUM,
        metrics={LENGTH: float(solved), **successes, "steps": float(sum(played.num_steps))},
        details={
            "tasks": list(played.chain.tasks),
            "steps": list(played.num_steps),
            "failed": played.chain.tasks[solved] if solved < CHAIN_LENGTH else None,
        },
    )


def scores_of(items: Sequence[Item], *, seed: int = 0) -> dict[str, Score]:
    """Average length with its bootstrap interval; the share of chains with 1 to 5 in a row and, under `task/NAME`,
    of tries of each task, with Wilson's.
    """
    lengths = [item.metrics[LENGTH] for item in items]
    average = stratified_bootstrap({STRATUM: lengths}, seed=seed)
    scores = {
        LENGTH: Score(
            value=average.value, low=average.low, high=average.high, count=average.num_items, method="bootstrap"
        )
    }
    for count in range(1, CHAIN_LENGTH + 1):
        name = f"success_{count}"
        scores[name] = _share([item.metrics[name] > 0.5 for item in items])
    tries: dict[str, list[bool]] = {}
    for item in items:
        for place in range(len(item.details["steps"])):
            tries.setdefault(item.details["tasks"][place], []).append(place < item.metrics[LENGTH])
    return scores | {f"task/{task}": _share(tries[task]) for task in sorted(tries)}


def _share(outcomes: list[bool]) -> Score:
    successes, count = sum(outcomes), len(outcomes)
    low, high = wilson_interval(successes, count)
    return Score(value=successes / count, low=low, high=high, count=count, successes=successes, method="wilson")


def _protocol(
    config: CalvinConfig, file: ChainFile, sentences: dict[str, str], benchmark: Benchmark
) -> dict[str, object]:
    """Every setting that changes a number. Two results compare only if it is equal."""
    return {
        "sequences": {"version": file.version, "digest": file.digest, "count": config.sequences},
        "max_steps": config.max_steps,
        "seed": config.seed,
        "sentences": sha256_json(sentences),
        "benchmark": benchmark.facts(),
    }


def _result(
    config: CalvinConfig, records: list[ChainRecord], policy_digest: str, suite_version: str, file: ChainFile
) -> EvaluationResult:
    items = tuple(record.item for record in records)
    clips = {
        f"{record.item.item_id}: {record.item.metrics[LENGTH]:.0f} of {CHAIN_LENGTH} solved": record.clip
        for record in records
        if record.clip
    }
    return EvaluationResult(
        suite=config.suite,
        suite_version=suite_version,
        model=config.policy,
        model_digest=policy_digest,
        data_digest=file.digest,
        code_version=version("foreframe"),
        primary_metric=LENGTH,
        seeds=(config.seed,),
        items=items,
        scores=scores_of(items, seed=config.seed),
        artefacts={**clips, "latency": LATENCY_NAME},
        inputs=(policy_digest,),
    )


def _log_summary(result: EvaluationResult) -> None:
    length = result.scores[LENGTH]
    rates = " ".join(f"{result.scores[f'success_{count}'].value:.3f}" for count in range(1, CHAIN_LENGTH + 1))
    log.info(
        "%s: average length %.3f [%.3f, %.3f] over %d chains; 1 to 5 in a row: %s",
        result.model, length.value, length.low, length.high, length.count, rates,
    )  # fmt: skip
