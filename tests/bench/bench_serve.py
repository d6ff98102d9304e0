"""A served policy at its maximum rate, slow and hostile clients beside the good ones.

    python -m tests.bench.bench_serve --seconds 300

Every good client numbers its questions and checks that each answer is to its own last question: lost, doubled or
exchanged answers show. The server has a process of its own; its resident size is printed along the way. The policy
costs nothing, so the rate is that of the server and of its clients, who share the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect

from evaluation.serving.client import PolicyClient
from evaluation.serving.wire import pack
from tests.helpers_serve import Counting, observation, serving
from training.protocols import Observation

LIMITS = {"max_message_bytes": 1 << 20, "send_timeout_s": 1.0, "idle_timeout_s": 5.0}
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
FULL = b"\xdc\x10\x00"  # a list of 4096


class Talkative(Counting):
    """Answers the sentence "all" with a chunk that fills the buffers of whoever does not read it."""

    action_horizon = 50_000

    def act(self, observed: Observation) -> np.ndarray:
        chunk = super().act(observed)[:, :3]
        return np.repeat(chunk, 15_000, axis=1) if observed.text == ("all",) else chunk


@dataclass
class Outcome:
    """Counts over all clients; `latencies_ms` of good ones, `others` by what they do."""

    asked: int = 0
    answered: int = 0
    wrong: int = 0
    others: Counter[str] = field(default_factory=Counter)
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

    def again(misbehave: Callable[[str], None]) -> None:
        while time.monotonic() < stop:
            with contextlib.suppress(OSError, WebSocketException):
                misbehave(url)
            with lock:
                outcome.others[misbehave.__name__] += 1
            time.sleep(0.02)

    threads = [threading.Thread(target=honest, args=(number + 1,)) for number in range(good)]
    threads += [threading.Thread(target=again, args=(kind,)) for kind in OTHERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _says(url: str, message: bytes | str) -> None:
    with connect(url, compression=None, close_timeout=1) as connection:
        connection.recv()
        connection.send(message)
        connection.recv(timeout=2)


def garbage(url: str) -> None:
    """Random bytes."""
    _says(url, os.urandom(1000))


def oversized(url: str) -> None:
    """Twice as much as is allowed."""
    _says(url, b"\x00" * (2 << 20))


def deep_bomb(url: str) -> None:
    """Lists in lists in lists."""
    _says(url, b"\x91" * 500_000)


def wide_bomb(url: str) -> None:
    """As many empty maps as fit."""
    _says(url, FULL + (FULL + b"\x80" * 4096) * 250)


def wrong(url: str) -> None:
    """A message of the convention with a picture of another type."""
    _says(url, pack(observation() | {"observation/image": np.zeros((4, 4, 3), np.float32)}))


def deaf(url: str) -> None:
    """Asks for long answers, as fast as it can, and never reads one."""
    frame = Frame(Opcode.BINARY, pack(observation(prompt="all"))).serialize(mask=True)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        raw.sendall(HANDSHAKE)
        while True:  # until the server hangs up
            raw.sendall(frame)


def half_open(url: str) -> None:
    """Never finishes its request."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        time.sleep(0.5)


def slow(url: str) -> None:
    """Sends a right observation in ten pieces within a second, and reads the answer late."""
    whole = pack(observation())

    def pieces() -> Iterator[bytes]:
        for part in range(10):
            time.sleep(0.1)
            yield whole[part * len(whole) // 10 : (part + 1) * len(whole) // 10]

    with connect(url, compression=None, close_timeout=1) as connection:
        connection.recv()
        connection.send(pieces())
        time.sleep(0.5)
        connection.recv(timeout=2)


OTHERS = (garbage, oversized, deep_bomb, wide_bomb, wrong, deaf, half_open, slow)


def served(pipe: Connection) -> None:
    """The server's process: says its address, ends when told."""
    with serving(Talkative(), **LIMITS) as (url, _):
        pipe.send(url)
        pipe.recv()


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--good", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=served, args=(there,), daemon=True)
    server.start()
    url, pid = here.recv(), server.pid
    assert pid is not None
    load(url, seconds=min(10.0, given.seconds / 10), good=given.good)  # warm: allocators, threads
    memory, outcomes = [resident_mb(pid)], []
    for _ in range(given.rounds):
        outcomes.append(load(url, seconds=given.seconds / given.rounds, good=given.good))
        memory.append(resident_mb(pid))
    here.send("end")
    server.join(20)
    latencies = np.concatenate([outcome.latencies_ms for outcome in outcomes])
    asked, answered, wrongly = (
        sum(getattr(item, name) for item in outcomes) for name in ("asked", "answered", "wrong")
    )
    print(f"asked {asked}, answered {answered}, wrong {wrongly}, {answered / given.seconds:.0f} a second")
    others = sum((outcome.others for outcome in outcomes), Counter())
    print("beside them: " + ", ".join(f"{name} {count}" for name, count in sorted(others.items())))
    shown = ", ".join(f"p{p} {np.percentile(latencies, p):.2f}" for p in (50, 90, 99, 99.9))
    print(f"latency ms: {shown}, max {latencies.max():.1f}")
    print("server's resident MB after warm-up and each round: " + ", ".join(f"{value:.1f}" for value in memory))
    print(f"the server ended with {server.exitcode}")


if __name__ == "__main__":
    main()
