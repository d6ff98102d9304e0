"""`python -m ingest.main CONFIG.json [--dry-run] [--debug]`: simulate episodes or ingest a corpus.

The config's field `kind` says which. Exit code 2 and one line on standard error for anything a user can mend.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from infra.config import Config
from infra.errors import ConfigError
from infra.step import step_main
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


def parse_config(value: dict[str, Any]) -> Config:
    """The config object of a plain JSON value; its field `kind` picks the class."""
    kind = value.get("kind")
    if kind == "ingest":
        return IngestConfig.parse(value)
    if kind == "simulate":
        from ingest.simulators.config import SimulateConfig

        return SimulateConfig.parse(value)
    raise ConfigError(f"unknown kind {kind!r}.", remedy="Known kinds: ingest, simulate.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for an error that the user can mend."""
    return step_main(argv, stage="ingest", parse=parse_config, run=run, plan=_plan)


def _plan(config: Config) -> dict[str, Any]:
    return job.describe(config) if isinstance(config, IngestConfig) else config.to_json()


if __name__ == "__main__":
    sys.exit(main())
