"""From items and features to scores with intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from evaluation.result import Item, Score
from evaluation.statistics import paired_difference, stratified_bootstrap
from evaluation.video_quality.config import AUTOENCODER, COPY_FIRST_FRAME, TRUE_FRAMES, VideoQualityConfig
from evaluation.video_quality.features import FeatureExtractor
from evaluation.video_quality.frechet import set_score
from evaluation.video_quality.rate import LOSS, MODEL, ONE_STEP, Rated
from evaluation.video_quality.text import WrongArm, score_part

log = logging.getLogger(__name__)

MIN_STRATUM = 2  # a smaller group of clips has no spread of its own to resample
MIN_SET = 2
TEXT_PREFIX = "text/right-minus-wrong"
TEXT_METHOD = "sign-flip over paired clips; wrong minus right validation loss: above 0, the right sentence is better"


def item_scores(items: Sequence[Item], *, seed: int) -> dict[str, Score]:
    """The mean of every metric over the clips that have it, resampled within labels."""
    names = dict.fromkeys(name for item in items for name in item.metrics)
    return {name: _mean_score([item for item in items if name in item.metrics], name, seed=seed) for name in names}


def text_scores(
    items: Sequence[Item], arms: Mapping[str, Sequence[Item]], wrong: Sequence[WrongArm]
) -> dict[str, Score]:
    """How much higher the loss is with a wrong sentence: all clips, per wrong sentence, and per pair of labels.

    Names are `text/right-minus-wrong` (means over a clip's wrong sentences), `...:WRONG` and `...:WRONG/OWN LABEL`; a
    difference in the good direction, as the gate counts it. Left out where fewer than 6 pairs allow no interval.
    """
    right = {item.item_id: item for item in items}
    of_clip: dict[str, list[float]] = {}
    scores: dict[str, Score] = {}
    for arm in wrong:
        pairs = [(item, right[item.item_id]) for item in arms.get(arm.name, ())]
        for item, _ in pairs:
            of_clip.setdefault(item.item_id, []).append(item.metrics[LOSS])
        name = f"{TEXT_PREFIX}:{score_part(arm.label)}"
        _add_difference(scores, name, [(a.stratum, a.metrics[LOSS], b.metrics[LOSS]) for a, b in pairs])
        for stratum in dict.fromkeys(item.stratum for item, _ in pairs):
            rows = [(stratum, a.metrics[LOSS], b.metrics[LOSS]) for a, b in pairs if a.stratum == stratum]
            _add_difference(scores, f"{name}/{score_part(stratum)}", rows)
    rows = [
        (right[name].stratum, sum(values) / len(values), right[name].metrics[LOSS]) for name, values in of_clip.items()
    ]
    overall: dict[str, Score] = {}
    _add_difference(overall, TEXT_PREFIX, rows)
    return overall | scores


def set_scores(
    rated: Rated, extractors: Sequence[FeatureExtractor], config: VideoQualityConfig
) -> dict[str, dict[str, Score]]:
    """Distances of each arm's clips from the true ones, by arm: over all clips, and over the first N of `counts`.

    Names are the extractor's, with `/N` for a count. The method of the score over all clips says which counts the data
    did not allow and whether frame 0 counts.
    """
    found: dict[str, dict[str, Score]] = {arm: {} for arm in (MODEL, ONE_STEP, COPY_FIRST_FRAME, AUTOENCODER)}
    for number, extractor in enumerate(extractors):
        truth = _joined(rated, number, TRUE_FRAMES)
        if len(truth) < MIN_SET:
            log.warning("no set scores: %d clip", len(truth))
            return found
        lacking = [count for count in config.counts if count > len(truth)]
        note = f"frame 0 {'included' if config.include_first_frame else 'left out'}"
        if lacking:
            note += f"; not possible with {len(truth)} clips: {', '.join(map(str, lacking))}"
        for arm, scores in found.items():
            shown = _joined(rated, number, arm)
            for count in dict.fromkeys([len(truth), *(c for c in config.counts if c < len(truth))]):
                ending = "" if count == len(truth) else f"/{count}"
                for distance, name in (("frechet", extractor.frechet_name), ("kernel", extractor.kernel_name)):
                    scores[f"{name}{ending}"] = set_score(
                        truth[:count],
                        shown[:count],
                        distance=distance,
                        num_resamples=config.num_resamples,
                        seed=config.seed,
                        note=note,
                    )
    return found


def _mean_score(items: Sequence[Item], name: str, *, seed: int) -> Score:
    strata: dict[str, list[float]] = {}
    for item in items:
        strata.setdefault(item.stratum, []).append(item.metrics[name])
    grouped = min(len(values) for values in strata.values()) >= MIN_STRATUM
    if not grouped:
        strata = {"all": [item.metrics[name] for item in items]}
    estimate = stratified_bootstrap(strata, seed=seed)
    method = "stratified bootstrap over clips" if grouped else "bootstrap over clips"
    return Score(value=estimate.value, low=estimate.low, high=estimate.high, count=len(items), method=method)


def _add_difference(scores: dict[str, Score], name: str, rows: Sequence[tuple[str, float, float]]) -> None:
    """`rows` are (stratum, wrong loss, right loss)."""
    if not rows:
        return
    wrong: dict[str, list[float]] = {}
    right: dict[str, list[float]] = {}
    for stratum, with_wrong, with_right in rows:
        wrong.setdefault(stratum, []).append(with_wrong)
        right.setdefault(stratum, []).append(with_right)
    estimate = paired_difference(wrong, right)
    if not math.isfinite(estimate.low):
        log.info("%s: %+.4f over %d pairs, too few for an interval", name, estimate.value, estimate.num_items)
        return
    scores[name] = Score(
        value=estimate.value, low=estimate.low, high=estimate.high, count=estimate.num_items, method=TEXT_METHOD
    )


def _joined(rated: Rated, number: int, arm: str) -> npt.NDArray[np.float32]:
    parts = rated.features.get((number, arm), [])
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
