"""The video prediction suite: a model and its control arms on equal held-out clips.

An item is a clip. Overlapping clips of one episode are not independent: with at most as many clips as episodes every
item is an episode of its own, which is what the order of rating aims at.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch

from evaluation.result import RESULT_NAME, EvaluationResult
from evaluation.suites import VIDEO_PREDICTION, claim_output, finished_result
from evaluation.video_quality.clips import ClipSet, batches
from evaluation.video_quality.config import PLACE_FIELDS, SIDE_FIELDS, VideoQualityConfig
from evaluation.video_quality.features import build_features
from evaluation.video_quality.lpips import load_lpips
from evaluation.video_quality.metrics import Clip
from evaluation.video_quality.motion import fit_probes
from evaluation.video_quality.parts import join_parts, load_part, save_part
from evaluation.video_quality.pictures import side_by_side_mp4, strip_png
from evaluation.video_quality.rate import LOSS, MODEL, ONE_STEP, Rated, Rater
from evaluation.video_quality.scores import item_scores, set_scores, text_scores
from evaluation.video_quality.text import wrong_arms
from evaluation.video_quality.weights import digest_of
from infra.storage import join, write_bytes, write_json
from training.export import load_video_model, video_digest
from training.protocols import VideoPredictor

__all__ = ["VideoQualityConfig", "evaluate", "run"]

log = logging.getLogger(__name__)

PART_CLIPS = 32  # rated between two points from which a killed evaluation resumes


def run(config: VideoQualityConfig) -> EvaluationResult:
    """Rate the model at `config.model`; `result.json` is written last and a finished output is read, not redone.

    Raises `InputError` if the output holds another evaluation or a file that the config names cannot be used, and
    `ConfigError` if model and clips do not fit.
    """
    claim_output(config, output=config.output, place_fields=PLACE_FIELDS)
    if found := finished_result(config.output, model=config.model, model_digest=video_digest(config.model)):
        return found
    return evaluate(config, load_video_model(config.model, autocast=config.autocast).to(_device(config)))


def evaluate(config: VideoQualityConfig, predictor: VideoPredictor) -> EvaluationResult:
    """`run` for a model that is already loaded."""
    digest = predictor.digest
    if found := finished_result(config.output, model=config.model, model_digest=digest):
        return found
    clips = ClipSet(config.sources, num_clips=config.num_clips)
    clips.require_frames(predictor.num_frames)
    wrong = wrong_arms(clips.chosen, config.wrong_text, max_sentences=config.max_sentences)
    extractors = build_features(config.features, i3d_weights=config.i3d_weights, device=_device(config))
    lpips = load_lpips(config.lpips_weights, config.lpips_backbone) if config.lpips_weights else None
    probes, probe_rests_on = fit_probes(config.probe, config.sources, size=predictor.image_size)
    rater = Rater(config, predictor, extractors, lpips, probes, wrong)
    parts = [_part(rater, clips, number, digest) for number in range((len(clips) + PART_CLIPS - 1) // PART_CLIPS)]
    rated = join_parts(parts)
    result = _pooled(rater, rated, clips, _protocol(rater, probe_rests_on))
    write_json(join(config.output, RESULT_NAME), result.to_json())
    loss = result.scores[LOSS]
    log.info("%s: loss %.4f [%.4f, %.4f], %d clips", config.model, loss.value, loss.low, loss.high, loss.count)
    return result


def _device(config: VideoQualityConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _part(rater: Rater, clips: ClipSet, number: int, digest: str) -> Rated:
    """Rate `PART_CLIPS` clips, or read that they were rated."""
    config = rater.config
    if found := load_part(config.output, number, model_digest=digest):
        return found
    rated = Rated()
    first = number * PART_CLIPS
    loaded = [
        clips.load(chosen, size=rater.predictor.image_size) for chosen in clips.chosen[first : first + PART_CLIPS]
    ]
    position = first
    for batch in batches(loaded, config.batch_size):
        for clip, shown in zip(batch, rater.rate(batch, rated), strict=True):
            if position < config.num_pictures:
                title = f"{clip.chosen.item_id}: {clip.chosen.text}".rstrip(": ")
                rated.artefacts.update(_store_pictures(config, position, title, shown))
            position += 1
    save_part(config.output, number, rated, model_digest=digest)
    log.info("%d of %d clips rated", position, len(clips))
    return rated


def _store_pictures(config: VideoQualityConfig, number: int, title: str, shown: dict[str, Clip]) -> dict[str, str]:
    strip, clip = f"pictures/clip-{number:03d}.png", f"clips/clip-{number:03d}.mp4"
    write_bytes(join(config.output, strip), strip_png(shown))
    write_bytes(join(config.output, clip), side_by_side_mp4(shown))
    return {f"{title} (frames)": strip, f"{title} (video)": clip}


def _protocol(rater: Rater, probe_rests_on: object) -> dict[str, Any]:
    """Every setting that changes a number; files count by their content, the model's sizes by value."""
    config = rater.config
    fields = {key: value for key, value in config.to_json().items() if key not in SIDE_FIELDS}
    probe = {key: value for key, value in config.probe.to_json().items() if key != "sources"}
    sizes = {"num_frames": rater.predictor.num_frames, "image_size": rater.predictor.image_size}
    lpips = [digest_of(path) for path in (config.lpips_weights, config.lpips_backbone) if path]
    features = {extractor.frechet_name: extractor.digest for extractor in rater.extractors}
    return fields | sizes | {"features": features, "lpips": lpips, "probe": probe, "probe_data": probe_rests_on}


def _pooled(rater: Rater, rated: Rated, clips: ClipSet, protocol: dict[str, Any]) -> EvaluationResult:
    config, seed = rater.config, rater.config.seed
    items = rated.items[MODEL]
    arms = {arm: tuple(rows) for arm, rows in rated.items.items() if arm != MODEL}
    sets = set_scores(rated, rater.extractors, config)
    one_step = {f"{name}/{ONE_STEP}": score for name, score in sets[ONE_STEP].items()}
    scores = item_scores(items, seed=seed) | sets[MODEL] | one_step | text_scores(items, arms, rater.wrong)
    data_digest = clips.digest
    return EvaluationResult(
        suite=config.suite,
        suite_version=VIDEO_PREDICTION.protocol_version(protocol),
        model=config.model,
        model_digest=rater.predictor.digest,
        data_digest=data_digest,
        code_version=version("foreframe"),
        primary_metric=VIDEO_PREDICTION.primary_metric,
        higher_is_better=False,
        seeds=(seed,),
        items=tuple(items),
        scores=scores,
        arms=arms,
        arm_scores={arm: item_scores(rows, seed=seed) | sets.get(arm, {}) for arm, rows in arms.items()},
        artefacts=rated.artefacts,
        inputs=tuple(dict.fromkeys((rater.predictor.digest, *clips.versions))),
    )
