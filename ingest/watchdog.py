"""A deadline for code that may hang inside a C library and never hand control back to Python."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

GRACE = 1.5  # an engine with its own timeout reports it first


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the whole process if the block takes longer; a thread of the C runtime does it, without the interpreter."""
    faulthandler.dump_traceback_later(seconds * GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
