"""`result.json`: what an evaluation leaves behind, and all that the gate and the report read."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from infra.config import Config

RESULT_NAME = "result.json"


class Item(Config):
    """One evaluated thing: a rollout (task, seed) or a video sequence. Items of two models pair by `item_id`."""

    item_id: str  # e.g. "drawer-open/10003"; equal for equal items of two models
    stratum: str  # the task or sequence group that bootstrap resamples within
    metrics: dict[str, float]
    details: dict[str, Any] = Field(default_factory=dict)


class Score(Config):
    """A pooled number with its interval (95 % unless the suite says otherwise) and the count behind it."""

    value: float
    low: float
    high: float
    count: int
    successes: int | None = None
    method: str = ""  # e.g. "wilson", "stratified bootstrap"


class EvaluationResult(Config):
    """One model (and its control arms) on one suite."""

    suite: str
    suite_version: str
    model: str  # url of the export, or a name for a control
    model_digest: str
    data_digest: str
    code_version: str
    primary_metric: str
    higher_is_better: bool = True
    seeds: tuple[int, ...] = ()
    items: tuple[Item, ...]
    scores: dict[str, Score]
    arms: dict[str, tuple[Item, ...]] = Field(default_factory=dict)  # control arms on the same items
    arm_scores: dict[str, dict[str, Score]] = Field(default_factory=dict)
    artefacts: dict[str, str] = Field(default_factory=dict)  # title -> path relative to the result's folder
    inputs: tuple[str, ...] = ()
