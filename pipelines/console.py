"""What a command shows: log lines without tracebacks of errors that name their own remedy, and small tables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from infra.errors import ForeframeError

PACKAGES = ("infra", "ingest", "training", "evaluation", "pipelines")
PREFECT_LOGGERS = ("prefect", "prefect.flow_runs", "prefect.task_runs")
LINE = "%(asctime)s %(levelname)-7s %(message)s"


def set_up_logging(*, debug: bool = False) -> None:
    """Our packages to standard error, one line each; Prefect sets the root logger to its own taste."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LINE, datefmt="%H:%M:%S"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if debug else logging.INFO)


def quiet_prefect(*, debug: bool = False) -> None:
    """Keep tracebacks of our own errors off the console once prefect is imported; its server still gets them."""
    if debug:
        return
    for name in PREFECT_LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if type(handler).__name__ == "PrefectConsoleHandler":
                handler.addFilter(_without_our_traceback)


def _without_our_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], ForeframeError):
        record.exc_info, record.exc_text = None, None
    return True


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text; numbers with three digits after the point."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(row.get(key)) for key in rows[0]] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)
