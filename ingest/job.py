"""One ingest from end to end: plan once, build the shards that have no receipt, write the manifest.

Every step is done or not done by what lies in the output; running again continues, and does nothing at the end.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from infra.digests import pretty_json, sha256_bytes, short
from infra.errors import ConfigError, DataError, InputError, TooManyFailuresError
from infra.faults import fault_point
from infra.ray_metrics import RayMetrics
from infra.ray_runtime import cluster_address
from infra.storage import absolute, create_only, exists, join, read_bytes, read_json
from ingest import downloads
from ingest.attempts import sweep
from ingest.build import build_shard
from ingest.corpora import corpus_module
from ingest.estimate import estimate
from ingest.places import check_source, note_what_is_new, placed
from ingest.plan import Plan, PlannedShard, make_plan
from ingest.progress import Progress
from ingest.reader import MANIFEST_NAME, load_manifest
from ingest.receipt import committed_shards, failure_ledger, read_receipt
from ingest.recipe import IngestConfig
from ingest.replay import read_parent
from ingest.schema import DECISIONS, PLAN_NAME, Failure, Manifest, Receipt
from ingest.sources import inspect_clips

log = logging.getLogger(__name__)

NAMED_EXAMPLES = 3


def run(config: IngestConfig) -> Manifest:
    """Build the data set, or what is missing of it. Raises `TooManyFailuresError`, `InputError`, `DataError`."""
    config = _with_downloads(placed(config))
    finished = _finished(config)
    if finished is not None:
        sweep(config.output, complete=True)
        if (plan := _stored_plan(config)) is not None:
            note_what_is_new(plan, config)
        log.info("%s is complete (%d samples): nothing to do", config.output, finished.num_samples)
        return finished
    made = prepare_plan(config)
    sweep(config.output, complete=False)
    receipts = _build_all(made, config)
    manifest = _commit(made, receipts, config)
    sweep(config.output, complete=True)
    log.info("%s: %d samples, %d failures", config.output, manifest.num_samples, manifest.num_failures)
    return manifest


def describe(config: IngestConfig) -> dict[str, Any]:
    """The plan's summary without writing anything: clips, hours, shards, bytes, and minutes from clips tried here."""
    config = placed(config)
    if config.corpus == "urls" and not exists(join(config.output, PLAN_NAME)):
        return downloads.describe(config.source, _downloads_root(config))
    if config.corpus == "urls":
        config = config.model_copy(update={"source": _downloads_root(config)})
    plan = _stored_plan(config) or _new_plan(config)
    committed = len(committed_shards(config.output))
    return {
        **plan.summary(),
        **estimate(plan, config),
        "shards_committed": committed,
        "complete": exists(join(config.output, MANIFEST_NAME)),
    }


def _with_downloads(config: IngestConfig) -> IngestConfig:
    """For a table of addresses: fetch what is missing, unless the plan is made, and go on from the files."""
    if config.corpus != "urls":
        if config.retry_failed:
            raise ConfigError(f"corpus {config.corpus!r} downloads nothing.", remedy="--retry-failed goes with urls.")
        return config
    root = _downloads_root(config)
    if not exists(join(config.output, PLAN_NAME)):
        parent = config.replay_failures
        downloads.fetch_table(
            config.source,
            root,
            config.download,
            only=read_parent(parent, corpus=config.corpus).failed if parent else None,
            retry_failed=config.retry_failed or bool(parent),
            max_failure_share=config.recipe.max_failure_share,
        )
    elif config.retry_failed:
        raise InputError(
            f"{config.output} has its plan already, which later downloads do not change.",
            remedy=f"Give a new OUT and --replay-failures {config.output}.",
        )
    return config.model_copy(update={"source": root})


def _downloads_root(config: IngestConfig) -> str:
    return absolute(config.downloads or join(config.output, "downloads"))


def prepare_plan(config: IngestConfig) -> Plan:
    """The plan this output already follows, else a new one, written create-only."""
    plan = _stored_plan(config)
    if plan is None:
        made = _new_plan(config)
        fault_point("ingest.before_plan")
        created = create_only(join(config.output, PLAN_NAME), pretty_json(made.to_json()))
        fault_point("ingest.after_plan")
        plan = made if created else _stored_plan(config)
        assert plan is not None
    log.info(
        "plan %s: %d clips, %d of them refused, %.2f hours of video, %d shards of about %.1f MB in all",
        short(plan.plan_id),
        plan.num_clips,
        sum(len(shard.failures) for shard in plan.shards),
        plan.estimated_hours,
        len(plan.shards),
        sum(shard.estimated_bytes for shard in plan.shards) / 1e6,
    )
    return plan


def manifest_version(output: str) -> str:
    """The data set's version: sha256 of its manifest."""
    return sha256_bytes(read_bytes(join(output, MANIFEST_NAME)))


def _finished(config: IngestConfig) -> Manifest | None:
    if not exists(join(config.output, MANIFEST_NAME)):
        return None
    manifest, _ = load_manifest(config.output)
    _check_same(config, manifest.name, manifest.corpus, manifest.recipe)
    return manifest


def _stored_plan(config: IngestConfig) -> Plan | None:
    place = join(config.output, PLAN_NAME)
    if not exists(place):
        return None
    plan = Plan.parse(read_json(place))
    _check_same(config, plan.name, plan.corpus, plan.recipe)
    return plan


def _check_same(config: IngestConfig, name: str, corpus: str, recipe: dict[str, Any]) -> None:
    asked, found = (config.name, config.corpus, config.recipe.identity()), (name, corpus, recipe)
    if asked == found:
        return
    differing = [key for key, value in config.recipe.identity().items() if recipe.get(key) != value]
    what = f"recipe fields {', '.join(differing)}" if differing else f"name or corpus ({name!r}, {corpus!r})"
    raise DataError(
        f"{config.output} already holds an ingest with other {what}.", remedy="Give each data set its own output."
    )


def _new_plan(config: IngestConfig) -> Plan:
    check_source(config)
    clips, replay = corpus_module(config.corpus).list_clips(config.source), None
    if not clips:
        raise InputError(f"{config.source} holds no clip of corpus {config.corpus!r}.")
    if config.replay_failures:
        replay = read_parent(config.replay_failures, corpus=config.corpus)
        clips = replay.choose(clips)
    inspected = inspect_clips(config.source, clips, config.recipe, config.corpus)
    return make_plan(inspected, corpus=config.corpus, name=config.name, recipe=config.recipe, replay=replay)


def _build_all(plan: Plan, config: IngestConfig) -> list[Receipt]:
    committed = set(committed_shards(config.output))
    receipts = [
        read_receipt(config.output, shard.shard, plan_id=plan.plan_id)
        for shard in plan.shards
        if shard.shard in committed
    ]
    failures = [failure for receipt in receipts for failure in real_failures(receipt)]
    _check_failures(failures, plan, config)
    missing = [shard for shard in plan.shards if shard.shard not in committed]
    missing.sort(key=lambda shard: -shard.estimated_bytes)  # the longest first, so that the end is not one of them
    if committed:
        log.info("resuming: %d of %d shards are committed", len(receipts), len(plan.shards))
    progress, metrics = Progress({shard.shard: shard.estimated_bytes for shard in plan.shards}), RayMetrics()
    for receipt in receipts:
        progress.add(receipt, resumed=True)
    for receipt in _build(missing, plan, config):
        receipts.append(receipt)
        failures += real_failures(receipt)
        if line := progress.add(receipt):
            log.info("%s", line)
            metrics.publish(progress.counters(), progress.rates())
        _check_failures(failures, plan, config)
    metrics.publish(progress.counters(), progress.rates())
    log.info("%s", progress.finish())
    return sorted(receipts, key=lambda receipt: receipt.shard)


def _build(missing: list[PlannedShard], plan: Plan, config: IngestConfig) -> Iterator[Receipt]:
    run_id = uuid.uuid4().hex[:8]
    alone = config.workers is None and len(missing) == 1 and not cluster_address()  # nothing to share out
    if config.workers == 0 or not missing or alone:
        for shard in missing:
            yield build_shard(shard, config, plan_id=plan.plan_id, run_id=run_id)
        return
    from ingest.distribute import build_on_ray

    yield from build_on_ray(missing, config, plan_id=plan.plan_id, run_id=run_id)


def real_failures(receipt: Receipt) -> list[Failure]:
    """Those of a shard that are its sources' fault: a duplicate, say, is not."""
    return [failure for failure in receipt.failures if failure.reason not in DECISIONS]


def _check_failures(failures: list[Failure], plan: Plan, config: IngestConfig) -> None:
    """Stop only when too much of the plan has failed."""
    if plan.parent:
        return  # made of nothing but failures
    if len(failures) <= config.recipe.max_failure_share * plan.num_clips:
        return
    counts = Counter(failure.reason for failure in failures)
    reason, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    examples = [failure for failure in failures if failure.reason == reason][:NAMED_EXAMPLES]
    raise TooManyFailuresError(
        f"{len(failures)} of {plan.num_clips} clips failed, more than the allowed share "
        f"{config.recipe.max_failure_share:g}; mostly {reason} ({count}): {_named(examples)}.",
        remedy="Mend the sources and use a new output, or see all of them with a higher recipe.max_failure_share.",
    )


def _named(failures: Iterable[Failure]) -> str:
    return "; ".join(f"{failure.path} ({failure.message})" for failure in failures)


def _commit(plan: Plan, receipts: list[Receipt], config: IngestConfig) -> Manifest:
    manifest = Manifest(
        name=plan.name,
        corpus=plan.corpus,
        layout=config.recipe.layout,
        plan_id=plan.plan_id,
        recipe=plan.recipe,
        receipts=tuple(receipts),
        num_samples=sum(receipt.num_samples for receipt in receipts),
        num_frames=sum(receipt.num_frames for receipt in receipts),
        num_failures=sum(len(receipt.failures) for receipt in receipts),
        statistics=_statistics(receipts),
        inputs=plan.inputs,
        parent=plan.parent,
    )
    data = pretty_json(manifest.to_json())
    place = join(config.output, MANIFEST_NAME)
    fault_point("ingest.before_manifest")
    if not create_only(place, data) and read_bytes(place) != data:
        raise DataError(f"{place} exists with other content.", remedy="Was a shard's file edited? Use a new output.")
    fault_point("ingest.after_manifest")
    return Manifest.parse(json.loads(data))


def _statistics(receipts: list[Receipt]) -> dict[str, Any]:
    """Sums over the shards, and the failures by reason."""
    milliseconds = 0
    counts: dict[str, Counter[str]] = {}
    for receipt in receipts:
        for name, value in receipt.statistics.items():
            if isinstance(value, dict):
                counts.setdefault(name, Counter()).update(value)
            else:
                milliseconds += value
    reasons = Counter(failure.reason for failure in failure_ledger(receipts))
    return {
        "seconds": milliseconds / 1000,
        "tar_bytes": sum(receipt.tar_bytes for receipt in receipts),
        "failures": dict(sorted(reasons.items())),
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
    }
