"""`python -m training.main CONFIG.json`: run one training job described by a JSON file.

The field `kind` chooses the recipe. Running it again continues an unfinished run and leaves a finished one alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from infra.config import Config
from infra.errors import ConfigError
from infra.ray_runtime import prepare_environment
from infra.step import step_main


def parse_config(value: dict[str, Any]) -> Any:
    """The config object of a plain JSON value; `ConfigError` for an unknown kind or key."""
    from training.recipes.policy import PolicyConfig
    from training.recipes.rsp import PretrainConfig

    kinds: dict[str, type[Config]] = {"pretrain-rsp": PretrainConfig, "train-policy": PolicyConfig}
    kind = str(value.get("kind"))
    if kind not in kinds:
        raise ConfigError(f"unknown kind {kind!r}.", remedy=f"Use one of {', '.join(sorted(kinds))}.")
    return kinds[kind].parse(value)


def run(config: Any) -> dict[str, Any]:
    """Train and export; returns the summary that is also written to `summary.json`."""
    prepare_environment()
    from training.launch import launch

    return launch(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for an error that the user can mend."""
    return step_main(argv, stage="training", parse=parse_config, run=run, plan=_plan)


def _plan(config: Any) -> dict[str, Any]:
    from training.plan import dry_run

    return dry_run(config)


if __name__ == "__main__":
    sys.exit(main())
