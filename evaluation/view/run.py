"""`foreframe view`: serve a data set until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import webbrowser
from collections.abc import Callable
from typing import NoReturn

from evaluation.view.server import Viewer


def view(url: str, *, port: int = 0, browser: bool = True, announce: Callable[[str], None]) -> None:
    """Serve the data set at `url`, tell its address to `announce`, open it, and return at SIGINT or SIGTERM."""
    with Viewer(url, port=port) as viewer:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            announce(f"{viewer.address}  (Ctrl-C ends it)")
            if browser:
                webbrowser.open(viewer.address)
            with contextlib.suppress(KeyboardInterrupt):
                viewer.serve()
        finally:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
