"""`python -m evaluation.main CONFIG.json`: run one evaluation described by a JSON file.

The field `kind` chooses the suite. A finished output is left alone and its result read.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.result import EvaluationResult
from infra.config import Config
from infra.errors import ConfigError, ForeframeError
from infra.ray_runtime import prepare_environment
from infra.storage import read_json

log = logging.getLogger(__name__)


KINDS = ("label-propagation", "rollouts")


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
    from evaluation.label_propagation.config import LabelPropagationConfig
    from evaluation.label_propagation.suite import run as run_label_propagation

    return LabelPropagationConfig, run_label_propagation


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for an error that the user can mend."""
    prepare_environment()
    parser = argparse.ArgumentParser(prog="python -m evaluation.main", description="Run one evaluation.")
    parser.add_argument("config", help="JSON file, local or s3://; its field `kind` chooses the suite")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run(parse_config(_read(options.config)))
    except ForeframeError as error:
        if options.debug:
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


def _read(url: str) -> dict[str, Any]:
    value = read_json(url)
    if not isinstance(value, dict):
        raise ConfigError(f"{url} holds a {type(value).__name__}, not an object.", remedy="Give a JSON object.")
    return value


if __name__ == "__main__":
    sys.exit(main())
