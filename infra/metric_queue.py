"""Numbers on their way to the tracking server, without making the sender wait.

A bounded buffer and one thread: batches go out every few seconds; while the server is away they wait, and when the
buffer is full the oldest go. `metrics.jsonl` of a run is the complete record; the server's curves are a view of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from infra.errors import ServiceError

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_BATCH = 1000
WARN_EVERY_S = 60.0


class MetricQueue(Generic[T]):
    """`put` never blocks; `send` gets batches of at most `MAX_BATCH` in order and may raise `ServiceError`."""

    def __init__(
        self,
        send: Callable[[Sequence[T]], None],
        *,
        capacity: int = 50_000,
        every_s: float = 2.0,
        retry_s: float = 10.0,
    ) -> None:
        self._send = send
        self._capacity = capacity
        self._every_s, self._retry_s = every_s, retry_s
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None
        self._warned_s = 0.0
        self.num_dropped = 0

    def put(self, items: Sequence[T]) -> None:
        """Take items over; the oldest make room when the buffer is full."""
        with self._lock:
            self._items.extend(items)
            while len(self._items) > self._capacity:
                self._items.popleft()
                self.num_dropped += 1
            self._idle.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="metric-queue", daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float) -> int:
        """Send now what is there; returns how many items could not be delivered in time."""
        self._wake.set()
        self._idle.wait(timeout_s)
        with self._lock:
            left = len(self._items) + self.num_dropped
        if left:
            log.warning("%d metrics did not reach the tracking server; metrics.jsonl has them all", left)
        return left

    def _run(self) -> None:
        while True:
            self._wake.wait(self._every_s)
            self._wake.clear()
            if not self._send_all():
                self._wake.wait(self._retry_s)

    def _send_all(self) -> bool:
        while True:
            with self._lock:
                batch = [self._items[index] for index in range(min(MAX_BATCH, len(self._items)))]
                dropped_before = self.num_dropped
                if not batch:
                    self._idle.set()
                    return True
            try:
                self._send(batch)
            except ServiceError as error:
                self._warn(error)
                return False
            with self._lock:
                # Items dropped meanwhile were the front of this batch.
                for _ in range(len(batch) - (self.num_dropped - dropped_before)):
                    self._items.popleft()

    def _warn(self, error: ServiceError) -> None:
        if time.monotonic() - self._warned_s > WARN_EVERY_S:
            self._warned_s = time.monotonic()
            log.warning("the tracking server is away, %d metrics wait: %s", len(self._items), error)
