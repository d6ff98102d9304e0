"""Our flat counters as Ray metrics, for the dashboard and Prometheus; nothing at all where Ray is not up."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

DEPTH = 2  # `ingest/failures/truncated` is the metric `ingest_failures` with the tag kind=truncated


class RayMetrics:
    """Publishes totals as counters and everything else as gauges, if this process is part of a running Ray.

    Never imports Ray itself: a process that has not done so is part of none.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._published: dict[str, float] = {}

    def publish(self, counters: Mapping[str, float], gauges: Mapping[str, float]) -> bool:
        """Bring Ray's values to these; `counters` are totals, of which Ray gets the growth. False without Ray."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return False
        for name, value in counters.items():
            growth = value - self._published.get(name, 0.0)
            if growth > 0:
                self._metric("Counter", name).inc(growth, tags=_tags(name))
                self._published[name] = value
        for name, value in gauges.items():
            self._metric("Gauge", name).set(value, tags=_tags(name))
        return True

    def _metric(self, kind: str, name: str) -> Any:
        from ray.util import metrics

        key = "_".join(re.sub(r"\W", "_", part, flags=re.ASCII) for part in name.split("/")[:DEPTH])
        if key not in self._metrics:
            tagged = ("kind",) if _tags(name) else ()
            self._metrics[key] = getattr(metrics, kind)(key, description=f"foreframe: {key}", tag_keys=tagged)
        return self._metrics[key]


def _tags(name: str) -> dict[str, str]:
    rest = name.split("/")[DEPTH:]
    return {"kind": "/".join(rest)} if rest else {}
