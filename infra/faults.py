"""Named places where a test may kill this process, to prove that a rerun mends what a crash leaves behind.

    FOREFRAME_FAULT=ingest.after_tar            kill -9 at the first pass of that point
    FOREFRAME_FAULT=ingest.after_tar:3          at the third pass in this process
    FOREFRAME_FAULT=ingest.decode@seed-00003    only where the point's detail contains that text
    FOREFRAME_FAULT=ingest.decode@a=hang        sleep there for ever instead
    FOREFRAME_FAULT=one@a,two@b=hang            several, each on its own
    FOREFRAME_FAULT_ACTION=hang                 sleep for ever at all of them
    FOREFRAME_FAULT_ONCE=/some/file             at most once over all processes: the file is the memory

Without `FOREFRAME_FAULT` a point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

_passes: Counter[str] = Counter()


def fault_point(name: str, detail: str = "") -> None:
    """Die here if `FOREFRAME_FAULT` names this point. SIGKILL: no handler, no `finally`, no flush."""
    wanted = os.environ.get("FOREFRAME_FAULT")
    if wanted is None:
        return
    for entry in wanted.split(","):
        _pass(entry, name, detail)


def _pass(entry: str, name: str, detail: str) -> None:
    rest = entry.removesuffix("=hang")  # a detail may hold "=" too
    target, _, count = rest.partition(":")
    point, _, part = target.partition("@")
    if point != name or part not in detail:
        return
    _passes[entry] += 1
    if _passes[entry] != int(count or 1) or not _claim_once():
        return
    if rest != entry or os.environ.get("FOREFRAME_FAULT_ACTION") == "hang":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)


def _claim_once() -> bool:
    memory = os.environ.get("FOREFRAME_FAULT_ONCE")
    if not memory:
        return True
    try:
        Path(memory).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
