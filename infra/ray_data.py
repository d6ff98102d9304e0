"""What every Ray Data map over shards shares: a quiet driver, and errors that travel back as data.

A row that fails with a cause the user can mend returns that cause; as an exception Ray would bury it in a trace and
try the row again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from infra.errors import ConfigError, DataError, ForeframeError, InputError, MachineError, ServiceError, StorageError

ERRORS = {
    kind.__name__: kind for kind in (ConfigError, DataError, InputError, MachineError, ServiceError, StorageError)
}


def quiet_driver() -> None:
    """No progress bars and no execution plans: our own log says what is going on."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def to_row(work: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """The row of a JSON answer, or of the error that `work` raised."""
    try:
        value = work()
    except ForeframeError as error:
        return {"value": "", "error": type(error).__name__, "message": error.message, "remedy": error.remedy}
    return {"value": json.dumps(value), "error": "", "message": "", "remedy": ""}


def from_row(row: dict[str, Any]) -> Any:
    """The answer of a row; raises the error it holds."""
    if row["error"]:
        raise ERRORS.get(row["error"], ForeframeError)(row["message"], remedy=row["remedy"])
    return json.loads(row["value"])
