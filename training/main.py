"""`python -m training.main CONFIG.json`: run one training job described by a JSON file.

The field `kind` chooses the recipe. Running it again continues an unfinished run and leaves a finished one alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from infra.config import Config
from infra.errors import ConfigError, ForeframeError
from infra.ray_runtime import prepare_environment
from infra.storage import read_json

log = logging.getLogger(__name__)


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
    prepare_environment()
    parser = argparse.ArgumentParser(prog="python -m training.main", description="Run one training job.")
    parser.add_argument("config", help="JSON file, local or s3://; its field `kind` chooses the recipe")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = parse_config(_read(options.config))
        if options.dry_run:
            from training.plan import dry_run

            sys.stdout.write(json.dumps(dry_run(config), indent=2) + "\n")
        else:
            run(config)
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
