"""`python -m evaluation.main CONFIG.json`: run one evaluation described by a JSON file.

The field `kind` chooses the suite. A finished output is left alone and its result read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.result import EvaluationResult
from infra.config import Config
from infra.errors import ConfigError
from infra.ray_runtime import prepare_environment
from infra.step import step_main

KINDS = ("label-propagation", "rollouts", "calvin", "video-prediction")


def parse_config(value: dict[str, Any]) -> Config:
    """The config object of a plain JSON value; `ConfigError` for an unknown kind or key."""
    kind = str(value.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}.", remedy=f"Use one of {', '.join(KINDS)}.")
    return _suite(kind)[0].parse(value)


def run(config: Any) -> EvaluationResult:
    """Evaluate in this process; the result is also `result.json` in the config's output."""
    prepare_environment()
    return _suite(config.kind)[1](config)


def _suite(kind: str) -> tuple[type[Config], Callable[[Any], EvaluationResult]]:
    """(config class, function that runs it); imported here because each suite brings heavy packages of its own."""
    if kind == "rollouts":
        from evaluation.rollouts.config import RolloutsConfig
        from evaluation.rollouts.suite import run as run_rollouts

        return RolloutsConfig, run_rollouts
    if kind == "calvin":
        from evaluation.calvin.config import CalvinConfig
        from evaluation.calvin.suite import run as run_calvin

        return CalvinConfig, run_calvin
    if kind == "video-prediction":
        from evaluation.video_quality.config import VideoQualityConfig
        from evaluation.video_quality.suite import run as run_video_quality

        return VideoQualityConfig, run_video_quality
    from evaluation.label_propagation.config import LabelPropagationConfig
    from evaluation.label_propagation.suite import run as run_label_propagation

    return LabelPropagationConfig, run_label_propagation


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for an error that the user can mend."""
    return step_main(argv, stage="evaluation", parse=parse_config, run=run)


if __name__ == "__main__":
    sys.exit(main())
