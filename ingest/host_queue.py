"""Work by host: every host gets its turn, none more than so many at a time, and waiting holds no thread."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Host(Generic[T]):
    name: str
    fresh: deque[T] = field(default_factory=deque)
    again: list[tuple[float, int, T]] = field(default_factory=list)  # heap of (not before, number, item)
    active: int = 0
    free_at: float = 0.0  # the next start, in seconds of the monotonic clock
    entry: int = -1  # number of its one valid place in the line
    entry_at: float = 0.0

    def ready_at(self, limit: int) -> float | None:
        """When it can hand out an item; None while it cannot at all."""
        if self.active >= limit or not (self.fresh or self.again):
            return None
        return self.free_at if self.fresh else max(self.free_at, self.again[0][0])

    def pop(self, now: float) -> T:
        if self.again and (not self.fresh or self.again[0][0] <= now):
            return heapq.heappop(self.again)[2]
        return self.fresh.popleft()


class HostQueue(Generic[T]):
    """Items for any number of threads. Hosts stand in one line by the time they are ready, so that they take turns.

    `per_host` items of a host are out at a time, and `delay_s` seconds lie between two of its starts.
    """

    def __init__(self, items: Iterable[tuple[str, T]], *, per_host: int, delay_s: float = 0.0) -> None:
        self._per_host, self._delay_s = per_host, delay_s
        self._numbers = itertools.count()
        self._line: list[tuple[float, int, _Host[T]]] = []
        self._hosts: dict[str, _Host[T]] = {}
        self._changed = threading.Condition()
        self._open = 0  # items not finished yet
        self._stopped = False
        for name, item in items:
            self._hosts.setdefault(name, _Host(name)).fresh.append(item)
            self._open += 1
        for host in self._hosts.values():
            self._stand(host)

    def take(self) -> tuple[str, T] | None:
        """(host, item) as soon as one may start; None when all are finished or the queue was stopped."""
        with self._changed:
            while not self._stopped and self._open:
                now = time.monotonic()
                host, wait_s = self._first(now)
                if host is None:
                    self._changed.wait(wait_s)
                    continue
                item = host.pop(now)
                host.active += 1
                host.free_at = max(host.free_at, now + self._delay_s)
                self._stand(host, now)
                return host.name, item
            return None

    def finish(self, name: str) -> None:
        """An item of this host is done, well or not."""
        with self._changed:
            self._open -= 1
            self._release(name)

    def again(self, name: str, item: T, *, after_s: float, rests: bool = False) -> None:
        """Hand the item out again in `after_s` seconds; with `rests` its host starts nothing before that."""
        with self._changed:
            host, at = self._hosts[name], time.monotonic() + after_s
            heapq.heappush(host.again, (at, next(self._numbers), item))
            if rests:
                host.free_at = max(host.free_at, at)
            self._release(name)

    def stop(self) -> None:
        """Every `take` from now on gives None."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _release(self, name: str) -> None:
        host = self._hosts[name]
        host.active -= 1
        self._stand(host, time.monotonic())
        self._changed.notify_all()

    def _stand(self, host: _Host[T], now: float = 0.0) -> None:
        """Give the host a place in the line, unless it has one that is early enough."""
        ready = host.ready_at(self._per_host)
        if ready is None:
            return
        at = max(ready, now)  # who is ready now stands behind those that were ready before
        if host.entry >= 0 and host.entry_at <= at:
            return
        host.entry, host.entry_at = next(self._numbers), at
        heapq.heappush(self._line, (at, host.entry, host))

    def _first(self, now: float) -> tuple[_Host[T] | None, float | None]:
        """(host whose turn it is, None), or (None, seconds until one may be ready; None for a change only)."""
        while self._line:
            at, number, host = self._line[0]
            if number != host.entry:
                heapq.heappop(self._line)  # it got an earlier place since
                continue
            if at > now:
                return None, at - now
            heapq.heappop(self._line)
            host.entry = -1
            ready = host.ready_at(self._per_host)
            if ready is not None and ready <= now:
                return host, None
            self._stand(host, now)
        return None, None
