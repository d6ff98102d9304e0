"""A client of fifty lines for a served policy: numpy, msgpack and websockets, nothing else of the project's.

client = PolicyClient("ws://127.0.0.1:8765")
chunk = client.infer({"observation/image": image_HW3, "observation/state": state, "prompt": "open the drawer"})
chunk["actions"]  # (T, A): carry them out, then ask again
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import connect

from evaluation.serving.wire import pack, unpack

MAX_ANSWER_BYTES = 256 << 20
TOKEN_VARIABLE = "FOREFRAME_POLICY_TOKEN"  # noqa: S105  (what our own clients read; the server has one of its own)
connection_log = logging.getLogger(__name__)
connection_log.setLevel(logging.INFO)  # at DEBUG websockets writes headers down, the token among them


class PolicyError(RuntimeError):
    """The server's one line on why it did not answer."""


class PolicyClient:
    """One connection is one robot: the server keeps an episode's state for each. Not for several threads."""

    def __init__(self, url: str, *, token: str = "", timeout_s: float = 60.0) -> None:
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        self._timeout_s = timeout_s
        # No keepalive: a server that computes in its event loop, as openpi's does, answers no ping until it is done.
        self._connection = connect(
            url, compression=None, max_size=MAX_ANSWER_BYTES, additional_headers=headers, ping_interval=None,
            open_timeout=min(timeout_s, 20.0), close_timeout=2, logger=connection_log,
        )  # fmt: skip
        self.metadata: dict[str, Any] = unpack(self._received())
        if not isinstance(self.metadata, dict):
            self.close()
            raise PolicyError("what came first is no map of metadata")
        self._is_new = True

    def reset(self) -> None:
        """The next observation is the first of a new episode."""
        self._is_new = True

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """`actions` (T, A), `server_timing` and `policy_timing` in milliseconds."""
        self.send(observation)
        return self.receive()

    def send(self, observation: dict[str, Any]) -> None:
        """Ask without waiting, e.g. several robots at once; one question at a time for each connection."""
        tells = self._is_new and self.metadata.get("server") == "foreframe"  # a foreign server may know no such key
        self._connection.send(pack({**observation, "reset": True} if tells else observation))
        self._is_new = False

    def receive(self) -> dict[str, Any]:
        """The answer to what was sent."""
        answer: dict[str, Any] = unpack(self._received())
        return answer

    def close(self) -> None:
        """Say goodbye."""
        self._connection.close()

    def _received(self) -> bytes:
        try:
            message = self._connection.recv(timeout=self._timeout_s)
        except TimeoutError:
            self._connection.close_socket()  # a late answer must not be taken for that to the next question
            raise
        if isinstance(message, str):
            raise PolicyError(message)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
