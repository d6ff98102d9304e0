"""`python -m ingest.main CONFIG.json [--dry-run] [--debug]`: simulate episodes or ingest a corpus.

The config's field `kind` says which. Exit code 2 and one line on standard error for anything a user can mend.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from infra.config import Config
from infra.digests import pretty_json
from infra.errors import ConfigError, ForeframeError
from infra.ray_runtime import prepare_environment
from infra.storage import read_json
from ingest import job
from ingest.recipe import IngestConfig


def run(config: Config) -> Any:
    """Do what the config describes: an `IngestConfig` gives a `Manifest`, a `SimulateConfig` its corpus record."""
    if isinstance(config, IngestConfig):
        return job.run(config)
    from ingest.simulators import generate
    from ingest.simulators.config import SimulateConfig

    if not isinstance(config, SimulateConfig):
        raise ConfigError(f"{type(config).__name__} is no config of this stage.", remedy="Known: ingest, simulate.")
    return generate.run(config)


def load(path: str | Path) -> Config:
    """The config in a JSON file; its field `kind` picks the class."""
    value = read_json(path)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "ingest":
        return IngestConfig.parse(value)
    if kind == "simulate":
        from ingest.simulators.config import SimulateConfig

        return SimulateConfig.parse(value)
    raise ConfigError(f"{path} has kind {kind!r}.", remedy="Known kinds: ingest, simulate.")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the job."""
    prepare_environment()
    parser = argparse.ArgumentParser(prog="python -m ingest.main")
    parser.add_argument("config", help="JSON file, local or s3://")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = load(options.config)
        if options.dry_run:
            summary = job.describe(config) if isinstance(config, IngestConfig) else config.to_json()
            sys.stdout.write(pretty_json(summary).decode())
        else:
            run(config)
    except ForeframeError as error:
        if options.debug:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
