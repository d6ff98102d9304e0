"""A served policy at its maximum rate, slow and hostile clients beside the good ones.

    python -m tests.bench.bench_serve --seconds 300

Every good client numbers its questions and checks that each answer is to its own last question: lost, doubled or
exchanged answers show. Memory is the server process's resident size at the start, halfway and at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from evaluation.serving.client import PolicyClient
from tests.helpers_serve import Counting, observation, serving


@dataclass
class Outcome:
    """Counts over all clients; `latencies_ms` of good ones."""

    asked: int = 0
    answered: int = 0
    wrong: int = 0
    hostile: int = 0
    latencies_ms: list[float] = field(default_factory=list)


def load(url: str, *, seconds: float, good: int, size: int = 64) -> Outcome:
    """All kinds of clients for a while."""
    outcome, lock, stop = Outcome(), threading.Lock(), time.monotonic() + seconds

    def honest(number: int) -> None:
        asked, answered, wrong, latencies = 0, 0, 0, []
        with PolicyClient(url) as client:
            while time.monotonic() < stop:
                asked += 1
                state = number + asked / 1e6
                started = time.perf_counter()
                actions = client.infer(observation(number, state=state, size=size))["actions"]
                latencies.append(1e3 * (time.perf_counter() - started))
                answered += 1
                right = (np.float32(number / 255), np.float32(state), np.float32(asked / 1000))
                wrong += not np.allclose(actions[0, [0, 1, 3]], right, rtol=1e-5)
        with lock:
            outcome.asked += asked
            outcome.answered += answered
            outcome.wrong += wrong
            outcome.latencies_ms += latencies

    def again(misbehave) -> None:
        while time.monotonic() < stop:
            with contextlib.suppress(OSError, WebSocketException, TimeoutError):
                misbehave()
            with lock:
                outcome.hostile += 1
            time.sleep(0.02)

    def garbage() -> None:
        with connect(url, compression=None) as connection:
            connection.recv()
            connection.send(os.urandom(1000))
            connection.recv(timeout=2)

    def oversized() -> None:
        with connect(url, compression=None) as connection:
            connection.recv()
            connection.send(b"\x00" * (2 << 20))
            connection.recv(timeout=2)

    def bomb() -> None:
        with connect(url, compression=None) as connection:
            connection.recv()
            connection.send(b"\x91" * 500_000)
            connection.recv(timeout=2)

    def deaf() -> None:
        """Asks and asks, and never reads."""
        with connect(url, compression=None) as connection:
            from evaluation.serving.wire import pack

            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(20):
                connection.send(pack(observation()))

    def silent() -> None:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            time.sleep(0.5)

    threads = [threading.Thread(target=honest, args=(number + 1,)) for number in range(good)]
    threads += [threading.Thread(target=again, args=(kind,)) for kind in (garbage, oversized, bomb, deaf, silent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--good", type=int, default=4)
    given = parser.parse_args()
    with serving(Counting(), max_message_bytes=1 << 20, send_timeout_s=1.0) as (url, _):
        load(url, seconds=min(10.0, given.seconds / 10), good=given.good)  # warm: allocators, threads
        memory = [resident_mb()]
        outcomes = []
        for _ in range(2):
            outcomes.append(load(url, seconds=given.seconds / 2, good=given.good))
            memory.append(resident_mb())
    latencies = np.sort(np.concatenate([outcome.latencies_ms[-200_000:] for outcome in outcomes]))
    asked, answered = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("asked", "answered"))
    print(
        f"asked {asked}, answered {answered}, wrong {sum(outcome.wrong for outcome in outcomes)}, "
        f"{answered / given.seconds:.0f} a second"
    )
    print(f"hostile or slow connections {sum(o.hostile for o in outcomes)}")
    shown = ", ".join(f"p{p} {np.percentile(latencies, p):.2f}" for p in (50, 90, 99, 99.9))
    print(f"latency ms: {shown}, max {latencies[-1]:.1f}")
    print("resident MB after warm-up, halfway, at the end: " + ", ".join(f"{value:.1f}" for value in memory))


if __name__ == "__main__":
    main()
