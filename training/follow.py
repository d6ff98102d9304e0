"""Progress of a run whose workers are elsewhere: its `metrics.jsonl`, read every few seconds by the driver."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

from infra.errors import ForeframeError
from infra.storage import exists, read_bytes

log = logging.getLogger(__name__)

EVERY_S = 5.0


@contextlib.contextmanager
def following(metrics_url: str, *, total_steps: int, every_s: float = EVERY_S) -> Iterator[None]:
    """Log the newest metrics of a run while the block lasts; storage that is away for a while is no concern of it."""
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(metrics_url, total_steps, every_s, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def progress_line(record: dict[str, Any], total_steps: int) -> str:
    """One record of `metrics.jsonl` as a person wants it."""
    left_s = round(float(record.get("step_s", 0.0)) * (total_steps - int(record["step"])))
    losses = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name.startswith("loss"))
    speed = f"{record.get('step_s', 0.0):.2f} s/step"
    return f"step {record['step']}/{total_steps}  {losses}  {speed}  {left_s // 60}:{left_s % 60:02d} left"


def _follow(url: str, total_steps: int, every_s: float, over: threading.Event) -> None:
    shown = -1
    while not over.wait(every_s):
        with contextlib.suppress(ForeframeError, ValueError, KeyError):
            lines = read_bytes(url).splitlines() if exists(url) else []
            record = json.loads(lines[-1]) if lines else {}
            if record and record["step"] != shown:
                shown = record["step"]
                log.info("%s", progress_line(record, total_steps))
