"""The command line that all heavy steps share: `python -m <stage>.main CONFIG.json [--dry-run] [--debug]`.

Exit codes: 0 done; 2 an error the user can mend, one line on standard error; 75 one that another attempt may mend
(a server or a store was away), which the flow retries.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from infra.digests import pretty_json
from infra.errors import ConfigError, ForeframeError
from infra.ray_runtime import prepare_environment
from infra.storage import read_json

USER_ERROR, TRY_AGAIN = 2, 75


def step_main(
    argv: Sequence[str] | None,
    *,
    stage: str,
    parse: Callable[[dict[str, Any]], Any],
    run: Callable[[Any], Any],
    plan: Callable[[Any], dict[str, Any]] | None = None,
) -> int:
    """Read the config (local or `s3://`), run it or print its `plan`; returns the exit code."""
    prepare_environment()
    parser = argparse.ArgumentParser(prog=f"python -m {stage}.main")
    parser.add_argument("config", help="JSON file, local or s3://; its field `kind` says what to do")
    if plan is not None:
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = parse(_read(options.config))
        if plan is not None and options.dry_run:
            sys.stdout.write(pretty_json(plan(config)).decode())
        else:
            run(config)
    except ForeframeError as error:
        if options.debug:
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return TRY_AGAIN if error.retryable else USER_ERROR
    return 0


def _read(url: str) -> dict[str, Any]:
    value = read_json(url)
    if not isinstance(value, dict):
        raise ConfigError(f"{url} holds a {type(value).__name__}, not an object.", remedy="Give a JSON object.")
    return value
