"""How long each stage of a flow took, in order, for its report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipelines.tasks import logger


@dataclass
class Clock:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block and say where the flow is."""
        logger().info("── %s", name)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
