"""A policy that is served elsewhere, in closed loop here: any server that speaks openpi's websocket convention.

    ws://HOST:PORT                                    our keys, which are openpi's LIBERO ones
    ws://HOST:PORT?image=observation/image&state=observation/state&prompt=prompt&horizon=8
    ws://HOST:PORT?image.wrist=observation/wrist_image

`image.CAMERA=KEY` names a further camera's key, `actions=KEY` where the answer holds its chunk, `horizon=N` how many
actions of a chunk are carried out (default: what the server's metadata says, else all). `foreframe serve` tells its
cameras itself. The token comes from FOREFRAME_POLICY_TOKEN. Every environment has a connection of its own, because
servers keep an episode's state by connection. A remote policy's weights cannot be seen: its digest is that of its
address and metadata, so `name=CHECKPOINT` is for two policies that are served at one address, one after the other.
"""

from __future__ import annotations

import math
import os
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
from websockets.exceptions import InvalidStatus, WebSocketException

from evaluation.serving.client import TOKEN_VARIABLE, PolicyClient, PolicyError
from evaluation.serving.session import IMAGES
from evaluation.serving.wire import WireError
from infra.digests import sha256_bytes, sha256_json
from infra.errors import ConfigError, DataError, ServiceError
from training.protocols import Observation

SCHEMES = ("ws://", "wss://")
DEFAULTS = {"image": "observation/image", "state": "observation/state", "prompt": "prompt", "actions": "actions"}
ACTION_RANGE = (-1.0, 1.0)
MAX_LINE = 300  # characters of a foreign error that are passed on


def is_served(policy: str) -> bool:
    """Whether a policy is an address rather than an export."""
    return policy.startswith(SCHEMES)


class RemotePolicy:
    """The `Policy` behind an address. Asks all environments before it waits for the first answer."""

    def __init__(self, url: str, *, timeout_s: float = 300.0) -> None:  # a first inference may compile for minutes
        self._url, named, self._horizon = _parsed(url)
        self._keys = DEFAULTS | named
        self._timeout_s = timeout_s
        self._clients: list[PolicyClient] = []
        probe = self._connect()
        self.metadata = probe.metadata
        probe.close()
        self.is_ours = self.metadata.get("server") == "foreframe"
        self._images = self._image_keys(named)
        self.cameras = tuple(self._images)
        self.needs_images = bool(self._images)
        told = self.metadata.get("action_horizon", 0)
        self._horizon = self._horizon or (told if isinstance(told, int) and told > 0 else 0)
        self.action_horizon = self._horizon or 1  # known after the first answer
        self.digest = sha256_json({"url": url, "metadata": _plain(self.metadata)})
        self.timings: dict[str, float] = {}

    def reset(self, batch_size: int) -> None:
        """New episodes: a new connection for each environment, which foreign servers understand as well."""
        self.close()
        for _ in range(batch_size):
            self._clients.append(self._connect())

    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> (B, T, A), clipped to [-1, 1]. `ServiceError` when the server went away, `DataError` for its answers."""
        if len(self._clients) != len(observation.text):
            self.reset(len(observation.text))
        try:
            for row, client in enumerate(self._clients):
                client.send(self._message(observation, row))
            answers = [client.receive() for client in self._clients]
        except PolicyError as error:
            self.close()  # answers under way must not be taken for those to later observations
            raise DataError(
                f"{self._url} refused an observation: {_line(error)}", remedy="Name its keys in the url."
            ) from None
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise ServiceError(f"{self._url} stopped answering: {_line(error)}", remedy="Start it again.") from None
        chunks = [self._chunk(answer) for answer in answers]
        if len({chunk.shape for chunk in chunks}) > 1:
            raise DataError(f"{self._url} answers with chunks of different shapes: {[c.shape for c in chunks]}.")
        self.action_horizon = len(chunks[0])
        self.timings = {"server": sum(_server_seconds(answer) for answer in answers)}
        return np.stack(chunks)

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.close()
        self._clients = []

    def _message(self, observation: Observation, row: int) -> dict[str, Any]:
        missing = sorted(set(self.cameras) - set(observation.images))
        if missing:
            raise DataError(f"{self._url} needs camera {', '.join(missing)}, there are {sorted(observation.images)}.")
        message: dict[str, Any] = {
            key: np.ascontiguousarray(observation.images[camera][row]) for camera, key in self._images.items()
        }
        message[self._keys["state"]] = np.ascontiguousarray(observation.proprioception[row])
        message[self._keys["prompt"]] = observation.text[row]
        if self.is_ours and observation.keys:
            message["episode"] = observation.keys[row]
        return message

    def _image_keys(self, named: dict[str, str]) -> dict[str, str]:
        """Camera -> key: as the address names them, else as our own server tells them, else openpi's one picture."""
        given = {name.partition(".")[2] or "main": key for name, key in named.items() if name.startswith("image")}
        told = self.metadata.get("cameras")
        if not given and self.is_ours and isinstance(told, list):
            return {str(camera): f"{IMAGES}{camera}" for camera in told}
        return {"main": DEFAULTS["image"]} | given

    def _chunk(self, answer: Any) -> npt.NDArray[np.float32]:
        key = self._keys["actions"]
        actions = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray) or actions.ndim not in (1, 2) or actions.dtype.kind != "f":
            shown = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
            raise DataError(f"{self._url} answers {key!r} with {shown}, not floats (T, A).", remedy="E.g. ?actions=KEY")
        chunk = np.atleast_2d(actions).astype(np.float32)
        chunk = chunk[: self._horizon] if self._horizon else chunk
        if not len(chunk) or not np.isfinite(chunk).all():
            raise DataError(f"{self._url} answers with a chunk that is empty or not finite.")
        return np.clip(chunk, *ACTION_RANGE)

    def _connect(self) -> PolicyClient:
        try:
            return PolicyClient(self._url, token=os.environ.get(TOKEN_VARIABLE, ""), timeout_s=self._timeout_s)
        except InvalidStatus as error:
            status = error.response.status_code
            remedies = {
                401: f"Set {TOKEN_VARIABLE} where the evaluation runs.",
                503: f"It takes fewer connections than the {len(self._clients) + 1} asked for: lower batch_size.",
            }
            raise ServiceError(
                f"{self._url} refuses the connection with HTTP {status}.",
                remedy=remedies.get(status, "Is it a policy's address?"),
            ) from None
        except (OSError, WebSocketException, WireError, PolicyError) as error:
            raise ServiceError(
                f"no policy answers at {self._url}: {_line(error)}", remedy="Start it, e.g. foreframe serve MODEL."
            ) from None


def _parsed(url: str) -> tuple[str, dict[str, str], int]:
    """(address, keys that are named, horizon or 0)."""
    parts = urlsplit(url)
    keys: dict[str, str] = {}
    horizon = 0
    for name, value in parse_qsl(parts.query):
        if name == "horizon":
            if not value.isdigit() or value == "0":
                raise ConfigError(f"horizon={value} in {url} is no number of actions.", remedy="E.g. ?horizon=8")
            horizon = int(value)
        elif name == "name":
            pass  # only to tell two policies at one address apart: the whole address is part of the digest
        elif name in DEFAULTS or name.startswith("image."):
            keys[name] = value
        else:
            raise ConfigError(
                f"unknown key {name!r} in {url}.", remedy=f"Known: {', '.join(DEFAULTS)}, image.CAMERA, horizon, name."
            )
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", "")), keys, horizon


def _server_seconds(answer: dict[str, Any]) -> float:
    """What the server says that it took; 0 when it says nothing of use."""
    timing = answer.get("server_timing")
    told = timing.get("infer_ms") if isinstance(timing, dict) else None
    return float(told) / 1e3 if isinstance(told, int | float) and math.isfinite(told) else 0.0


def _plain(value: Any) -> Any:
    """Metadata as JSON, arrays by their bytes."""
    if isinstance(value, dict):
        return sorted(([repr(key), _plain(item)] for key, item in value.items()), key=lambda pair: str(pair[0]))
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), sha256_bytes(value.tobytes())]
    return repr(value)


def _line(error: Exception) -> str:
    """What openpi's server sends is a traceback; its last line says what was wrong."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return "".join(letter if letter.isprintable() else " " for letter in lines[-1].strip())[:MAX_LINE]
