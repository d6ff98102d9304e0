"""A policy server of our own in a thread, and a small deterministic policy for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from evaluation.serve import PolicyServer, ServeConfig
from training.protocols import Observation


class Counting:
    """Actions that tell what was seen: mean brightness, first state number, length of the sentence, decision."""

    needs_images = True
    action_horizon = 3
    cameras = ("main",)
    digest = "counting"

    def __init__(self) -> None:
        self._decision = 0

    def reset(self, batch_size: int) -> None:
        self._decision = 0

    def act(self, observation: Observation) -> np.ndarray:
        self._decision += 1
        rows = [
            [image.mean() / 255, state[0], len(text) / 100, self._decision / 1000]
            for image, state, text in zip(
                observation.images["main"], observation.proprioception, observation.text, strict=True
            )
        ]
        return np.repeat(np.asarray(rows, np.float32)[:, None], 5, axis=1)


@contextmanager
def serving(policy: object, *, token: str = "", **changes: object) -> Iterator[tuple[str, PolicyServer]]:
    """(address, server); stopped at the end."""
    server = PolicyServer(policy, ServeConfig(**({"model": "m", "port": 0} | changes)), token=token)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    port = next(iter(listening.sockets)).getsockname()[1]

    async def stop() -> None:
        listening.close()
        await listening.wait_closed()

    try:
        yield f"ws://127.0.0.1:{port}", server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        server.stop()
        loop.close()


def observation(value: int = 100, *, state: float = 0.25, prompt: str = "push", size: int = 16) -> dict[str, object]:
    return {
        "observation/image": np.full((size, size, 3), value, np.uint8),
        "observation/state": np.array([state, 0, 0, 0], np.float32),
        "prompt": prompt,
    }
