"""Versioned suites: what a name and version stand for, and how an output folder belongs to one evaluation.

A suite's version changes when the same model would get another number; two results compare only at equal versions.
The version in a result is `VERSION-DIGEST`: the code's version of the suite and the digest of its protocol.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.result import RESULT_NAME, EvaluationResult
from infra.config import Config
from infra.digests import pretty_json, sha256_json, short
from infra.errors import ConfigError, InputError
from infra.storage import create_only, exists, join, read_json

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Suite:
    """One kind of evaluation: the model it rates, its primary metric, what its items and control arms are."""

    name: str
    version: str
    rates: Literal["encoder", "policy", "video"]
    primary_metric: str
    item: str
    arms: tuple[str, ...]

    def protocol_version(self, protocol: dict[str, Any]) -> str:
        """The version written into results; `protocol` holds every setting that changes a number."""
        return f"{self.version}-{short(sha256_json(protocol))}"


LABEL_PROPAGATION = Suite(
    name="label-propagation",
    version="1",
    rates="encoder",
    primary_metric="J&F",
    item="a video sequence",
    arms=("random-initialisation", "raw-patches", "copy-first-mask"),
)
ROLLOUTS = Suite(
    name="metaworld-rollouts",
    version="2",
    rates="policy",
    primary_metric="success_ever",
    item="one episode of a task and seed",
    arms=("random-actions", "mean-demonstration", "proprioception", "other-episode", "oracle"),
)
VIDEO_PREDICTION = Suite(
    name="video-prediction",
    version="1",
    rates="video",
    primary_metric="validation_loss",
    item="a held-out clip",
    arms=("copy-first-frame", "autoencoder", "true-frames", "text:SENTENCE"),
)
CALVIN = Suite(
    name="calvin",
    version="1",
    rates="policy",
    primary_metric="average_length",
    item="a chain of five subtasks",
    arms=(),
)
SUITES = {suite.name: suite for suite in (LABEL_PROPAGATION, ROLLOUTS, VIDEO_PREDICTION, CALVIN)}


def find_suite(name: str) -> Suite:
    """A suite by name; `ConfigError` with a suggestion when there is none."""
    if name in SUITES:
        return SUITES[name]
    near = difflib.get_close_matches(name, SUITES, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Known suites: {', '.join(SUITES)}."
    raise ConfigError(f"unknown suite {name!r}.", remedy=remedy)


def claim_output(config: Config, *, output: str, place_fields: frozenset[str]) -> None:
    """Write `config.json`, or find the same one there: an output belongs to one evaluation.

    `place_fields` say where and how quickly, not what. Raises `InputError` that names the fields that differ.
    """
    wanted = config.to_json()
    url = join(output, CONFIG_NAME)
    if create_only(url, pretty_json(wanted)):
        return
    found = read_json(url)
    identity = (wanted.keys() | found.keys()) - place_fields
    changed = sorted(key for key in identity if wanted.get(key) != found.get(key))
    if changed:
        raise InputError(
            f"{output} belongs to another evaluation (different: {', '.join(changed)}).",
            remedy="Choose another output folder.",
        )


def finished_result(output: str, *, model: str, model_digest: str, suite_version: str = "") -> EvaluationResult | None:
    """The result of an earlier run, None if there is none yet; `InputError` if it rates other weights.

    `suite_version` is for suites whose protocol holds more than their config tells: the simulator's version, say.
    """
    url = join(output, RESULT_NAME)
    if not exists(url):
        return None
    result = EvaluationResult.parse(read_json(url))
    if result.model_digest != model_digest:
        raise InputError(
            f"{output} rates {short(result.model_digest)}, but {model} now is {short(model_digest)}.",
            remedy="Choose another output folder.",
        )
    if suite_version and result.suite_version != suite_version:
        raise InputError(
            f"{output} was measured with suite version {result.suite_version}, this is {suite_version}: "
            "another protocol, simulator or renderer.",
            remedy="Choose another output folder (--override output=URL) to measure it anew.",
        )
    log.info("%s is complete: nothing to evaluate", output)
    return result
