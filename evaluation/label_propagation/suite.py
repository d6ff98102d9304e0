"""The label propagation suite: an encoder and its control arms on equal sequences, with bootstrap intervals.

An item is a sequence and its metrics are means over the sequence's objects: the objects of one video stand or fall
together, so they are no independent items. The pooled scores are DAVIS's: means over all objects.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation.label_propagation.config import (
    COPY_FIRST_MASK,
    PLACE_FIELDS,
    RANDOM_INITIALISATION,
    SIDE_FIELDS,
    LabelPropagationConfig,
)
from evaluation.label_propagation.layouts import DavisFolder, read_davis
from evaluation.label_propagation.metrics import DavisScores, davis_scores
from evaluation.label_propagation.overlays import overlay_strips
from evaluation.label_propagation.predict import Clip, Pixels, copy_first_mask, predict, prepare
from evaluation.label_propagation.sequences import simulate_davis
from evaluation.result import RESULT_NAME, EvaluationResult, Item, Score
from evaluation.statistics import stratified_bootstrap
from evaluation.suites import LABEL_PROPAGATION, claim_output, finished_result
from infra.compute import MatmulLibrary, probe_matmul
from infra.digests import sha256_file, sha256_json
from infra.storage import get_folder, is_remote, join, local_path, write_bytes, write_json
from ingest.simulators.metaworld import prepare_rendering
from ingest.simulators.workers import WorkerPool
from training.export import load_encoder, random_encoder, raw_patches, read_record
from training.protocols import Encoder

__all__ = ["LabelPropagationConfig", "run"]

log = logging.getLogger(__name__)

ENCODER = "encoder"
METRICS = {"J&F": "J&F-Mean", "J": "J-Mean", "F": "F-Mean"}
CAPTIONS = {ENCODER: "encoder", RANDOM_INITIALISATION: "random weights", COPY_FIRST_MASK: "first mask copied"}
MIN_STRATUM = 2  # a smaller group of sequences has no spread of its own to resample


@dataclass(frozen=True)
class _Order:
    config: LabelPropagationConfig
    folder: DavisFolder
    name: str
    stratum: str
    draw: bool
    matmul: MatmulLibrary


@dataclass(frozen=True)
class _Outcome:
    name: str
    items: dict[str, Item]  # by arm, the encoder under its own name
    artefacts: dict[str, str]


def run(config: LabelPropagationConfig) -> EvaluationResult:
    """Propagate, score and write `result.json` last; a finished output is read, not redone.

    Raises `InputError` if the output holds another evaluation or the data are not in DAVIS layout.
    """
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    digest = str(read_record(config.encoder)["digest"])
    if found := finished_result(config.output, model=config.encoder, model_digest=digest):
        return found
    with _sequences(config) as folder:
        data_digest = _data_digest(folder)
        outcomes = _run_all(config, folder)
    result = _pooled(config, outcomes, model_digest=digest, data_digest=data_digest)
    write_json(join(config.output, RESULT_NAME), result.to_json())
    primary = result.scores[result.primary_metric]
    log.info("%s: J&F %.3f [%.3f, %.3f], %d sequences", config.encoder, *_triple(primary), len(result.items))
    return result


@contextmanager
def _sequences(config: LabelPropagationConfig) -> Iterator[DavisFolder]:
    """The checked local folder of annotated sequences, fetched or simulated where it is not there."""
    with tempfile.TemporaryDirectory(prefix="foreframe-") as temporary:
        if config.data:
            yield read_davis(get_folder(config.data, Path(temporary)))
            return
        prepare_rendering()
        place = Path(temporary) if is_remote(config.output) else local_path(join(config.output, "sequences"))
        yield simulate_davis(place, config.sequences)


def _run_all(config: LabelPropagationConfig, folder: DavisFolder) -> list[_Outcome]:
    matmul = probe_matmul() if config.matmul == "auto" else config.matmul
    orders = [
        _Order(config, folder, name, _stratum(config, name), draw=index < config.num_overlays, matmul=matmul)
        for index, name in enumerate(folder.names)
    ]
    outcomes: dict[str, _Outcome] = {}
    with WorkerPool(min(config.workers, len(orders))) as pool:
        for outcome in pool.map(_run_sequence, orders):
            outcomes[outcome.name] = outcome
            words = ", ".join(f"{arm} {item.metrics['J&F']:.3f}" for arm, item in outcome.items.items())
            log.info("%s: %s", outcome.name, words)
    return [outcomes[name] for name in folder.names]


def _run_sequence(order: _Order) -> _Outcome:
    """Every arm on one sequence, in a process of its own when there are several."""
    config = order.config
    if config.workers > 1:
        torch.set_num_threads(1)
    frames, labels = order.folder.frames(order.name), order.folder.labels(order.name)
    clip = prepare(order.name, frames, labels, stretch=config.stretch)
    with _multiplying_with(order.matmul):
        maps = {ENCODER: predict(clip, _encoder(config.encoder), config)}
        for arm in config.arms:
            maps[arm] = _control(arm, config)(clip)
    items = {arm: _item(order, davis_scores(clip.labels, prediction)) for arm, prediction in maps.items()}
    return _Outcome(order.name, items, _store_overlays(order, clip, maps) if order.draw else {})


@contextmanager
def _multiplying_with(library: MatmulLibrary) -> Iterator[None]:
    """The float32 matmul library for the length of the block; the process may belong to someone else."""
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if library == "onednn" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(found)


def _control(arm: str, config: LabelPropagationConfig) -> Callable[[Clip], Pixels]:
    if arm == COPY_FIRST_MASK:
        return copy_first_mask
    if arm == RANDOM_INITIALISATION:
        encoder: Encoder = _random(config.encoder, config.seed)
    else:
        encoder = raw_patches(_encoder(config.encoder).patch_size)
    return lambda clip: predict(clip, encoder, config)


@lru_cache(maxsize=2)
def _encoder(url: str) -> Encoder:
    return load_encoder(url)


@lru_cache(maxsize=2)
def _random(url: str, seed: int) -> Encoder:
    return random_encoder(url, seed=seed)


def _item(order: _Order, scores: DavisScores) -> Item:
    statistics = scores.statistics
    objects = [
        {"object": index + 1} | {name: float(column[index]) for name, column in statistics.items()}
        for index in range(scores.num_objects)
    ]
    return Item(
        item_id=order.name,
        stratum=order.stratum,
        metrics={name: float(statistics[column].mean()) for name, column in METRICS.items()},
        details={"objects": objects, "scored_frames": int(scores.region.shape[1])},
    )


def _store_overlays(order: _Order, clip: Clip, maps: dict[str, Pixels]) -> dict[str, str]:
    captioned = {"truth": clip.labels} | {CAPTIONS.get(arm, arm.replace("-", " ")): maps[arm] for arm in maps}
    stored = {}
    for percent, png in overlay_strips(clip.frames, captioned).items():
        path = f"overlays/{order.name}-{percent}.png"
        write_bytes(join(order.config.output, path), png)
        stored[f"{order.name} at {int(percent)} % of the sequence"] = path
    return stored


def _stratum(config: LabelPropagationConfig, name: str) -> str:
    """The task of a simulated sequence; the sequences of a data set are one group."""
    return config.suite if config.data else name.rsplit("-", 1)[0]


def _pooled(
    config: LabelPropagationConfig, outcomes: Sequence[_Outcome], *, model_digest: str, data_digest: str
) -> EvaluationResult:
    items = {arm: tuple(outcome.items[arm] for outcome in outcomes) for arm in (ENCODER, *config.arms)}
    scores = {arm: scores_of(rows, seed=config.seed) for arm, rows in items.items()}
    protocol = {key: value for key, value in config.to_json().items() if key not in SIDE_FIELDS}
    if config.data:
        del protocol["sequences"]  # not used, and the data digest says what was
    return EvaluationResult(
        suite=config.suite,
        suite_version=LABEL_PROPAGATION.protocol_version(protocol),
        model=config.encoder,
        model_digest=model_digest,
        data_digest=data_digest,
        code_version=version("foreframe"),
        primary_metric=LABEL_PROPAGATION.primary_metric,
        seeds=(config.seed,),
        items=items[ENCODER],
        scores=scores[ENCODER],
        arms={arm: items[arm] for arm in config.arms},
        arm_scores={arm: scores[arm] for arm in config.arms},
        artefacts={title: path for outcome in outcomes for title, path in outcome.artefacts.items()},
        inputs=(model_digest, data_digest),
    )


def scores_of(items: Sequence[Item], *, seed: int) -> dict[str, Score]:
    """J&F, J and F over all objects, and J&F of each object number where every sequence has the same number.

    Intervals resample sequences within strata; where a stratum has a single sequence, all are one stratum.
    """
    scores = {name: _score(items, column, seed=seed) for name, column in METRICS.items()}
    counts = {len(item.details["objects"]) for item in items}
    if len(counts) == 1:
        for number in range(1, counts.pop() + 1):
            scores[f"J&F/object-{number}"] = _score(items, METRICS["J&F"], seed=seed, only_object=number)
    return scores


def _score(items: Sequence[Item], column: str, *, seed: int, only_object: int | None = None) -> Score:
    values = [
        [row[column] for row in item.details["objects"] if only_object in (None, row["object"])] for item in items
    ]
    totals, counts = np.array([sum(row) for row in values]), np.array([len(row) for row in values])

    def mean_over_objects(sequences: np.ndarray) -> float:
        chosen = sequences.astype(np.int64)
        return float(totals[chosen].sum() / counts[chosen].sum())

    strata: dict[str, list[float]] = {}
    for index, item in enumerate(items):
        strata.setdefault(item.stratum, []).append(float(index))
    grouped = min(len(members) for members in strata.values()) >= MIN_STRATUM
    if not grouped:
        strata = {"all": [float(index) for index in range(len(items))]}
    estimate = stratified_bootstrap(strata, mean_over_objects, seed=seed)
    method = "stratified bootstrap over sequences" if grouped else "bootstrap over sequences"
    return Score(value=estimate.value, low=estimate.low, high=estimate.high, count=len(items), method=method)


def _data_digest(folder: DavisFolder) -> str:
    """sha256 over every picture and annotation that is used."""
    files = {
        f"{kind}/{name}/{frame}": sha256_file(folder.root / kind / folder.resolution / name / f"{frame}.{suffix}")
        for name in folder.names
        for frame in folder.frame_names[name]
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png"))
    }
    return sha256_json(files)


def _triple(score: Score) -> tuple[float, float, float]:
    return score.value, score.low, score.high
