"""`foreframe serve`: a policy behind a websocket, in the message convention of openpi's client package.

The server speaks first (metadata), then answers every observation with a chunk of actions. Inference is one thread, so
requests are answered in the order they came; a connection has one request at a time, so none can crowd out the others.
On loopback anybody may ask; elsewhere a token is required. The peer never sees more of an error than one line.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from pydantic import Field
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from evaluation.serving.session import ObservationError, ObservationSchema, Session
from evaluation.serving.wire import WireError, pack, unpack
from infra.config import Config
from infra.errors import ConfigError, ForeframeError
from training.protocols import Policy

log = logging.getLogger(__name__)
connection_log = logging.getLogger(f"{__name__}.connections")
connection_log.setLevel(logging.INFO)  # at DEBUG websockets writes headers down, the token among them

TOKEN_VARIABLE = "FOREFRAME_SERVE_TOKEN"  # noqa: S105  (the variable's name, not a token)
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
HEALTH = "/healthz"
BAD_MESSAGE, BUSY = 1007, 1013


def _without_handshake_trace(record: logging.LogRecord) -> bool:
    """A peer that breaks off its handshake is worth a line of the log, not a page."""
    if record.getMessage() == "opening handshake failed":
        record.exc_info = None
    return True


connection_log.addFilter(_without_handshake_trace)


class ServeConfig(Config):
    """What to serve and to whom. `action_horizon` 0: as many actions of a chunk as the policy was trained to execute.

    `provider` is where the frozen model of a policy lies if it has moved; `prompt` stands in for a missing one.
    """

    model: str
    provider: str = ""
    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)
    prompt: str = ""
    action_horizon: int = Field(default=0, ge=0)
    max_message_bytes: int = Field(default=32 << 20, ge=1 << 10)
    max_connections: int = Field(default=32, ge=1)
    max_errors: int = Field(default=16, ge=1, description="wrong observations before a connection is closed")
    idle_timeout_s: float = Field(default=600.0, gt=0)
    send_timeout_s: float = Field(default=20.0, gt=0, description="for a peer that does not read its answers")


class PolicyServer:
    """Serves one policy. `token` empty: none is asked for, which is refused for any host but loopback."""

    def __init__(self, policy: Policy, config: ServeConfig, *, token: str = "") -> None:
        if config.host not in LOOPBACK and not token:
            raise ConfigError(
                f"host {config.host} is not loopback and {TOKEN_VARIABLE} is not set.",
                remedy=f"Set {TOKEN_VARIABLE}, or serve on 127.0.0.1.",
            )
        self.config = config
        self._policy, self._token = policy, token
        self._horizon = config.action_horizon or policy.action_horizon
        self._schema = ObservationSchema(_cameras(policy), _state_dim(policy), config.prompt)
        self._inference = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self.open_connections = 0
        self.answered = 0

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told first."""
        return {
            "server": "foreframe",
            "version": version("foreframe"),
            "policy": self._policy.digest,
            "needs_images": self._policy.needs_images,
            "cameras": list(self._schema.cameras),
            "state_dim": self._schema.state_dim,
            "action_horizon": self._horizon,
        }

    async def start(self) -> Server:
        """Listen; the server's `sockets` say where."""
        return await serve(
            self._converse, self.config.host, self.config.port, process_request=self._admit, compression=None,
            origins=[None],  # a browser names its page's origin: no page may drive a robot from behind its user's back
            max_size=self.config.max_message_bytes, max_queue=1, ping_interval=20, ping_timeout=20, open_timeout=10,
            close_timeout=2, server_header=None, logger=connection_log,
        )  # fmt: skip

    def stop(self) -> None:
        """After the last connection: let the inference thread end."""
        self._inference.shutdown(cancel_futures=True)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token and not _has_token(request, self._token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Api-Key TOKEN\n")
        if self.open_connections >= self.config.max_connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        if self.open_connections >= self.config.max_connections:  # several were admitted at the same moment
            await connection.close(BUSY, "too many connections")
            return
        self.open_connections += 1
        try:
            await self._send(connection, pack(self.metadata))
            await self._answer_all(connection, Session(self._policy, self._horizon))
        except (ConnectionClosed, TimeoutError):
            pass  # the peer has gone, or does nothing for too long: nothing of ours is lost
        finally:
            self.open_connections -= 1

    async def _answer_all(self, connection: ServerConnection, session: Session) -> None:
        errors, previous_ms = 0, 0.0
        while errors < self.config.max_errors:
            data = await asyncio.wait_for(connection.recv(), self.config.idle_timeout_s)
            started = time.perf_counter()
            try:
                answer = await self._answer(data, session)
            except WireError as error:
                await self._send(connection, f"error: {error}")
                await connection.close(BAD_MESSAGE, "not a message of the convention")
                return
            except (ObservationError, ForeframeError) as error:
                errors += 1
                await self._send(connection, f"error: {_line(error)}")
                continue
            if previous_ms:
                answer["server_timing"]["prev_total_ms"] = previous_ms
            await self._send(connection, pack(answer))
            self.answered += 1
            previous_ms = 1e3 * (time.perf_counter() - started)
        await connection.close(BAD_MESSAGE, "too many wrong observations")

    async def _answer(self, data: str | bytes, session: Session) -> dict[str, Any]:
        if isinstance(data, str):
            raise WireError("an observation is a binary message")
        observation, reset = self._schema.parse(unpack(data))
        queued = time.perf_counter()
        work = partial(session.act, observation, reset=reset)
        answer = await asyncio.get_running_loop().run_in_executor(self._inference, work)
        total_ms = 1e3 * (time.perf_counter() - queued)
        infer_ms = answer["policy_timing"]["infer_ms"]
        return {**answer, "server_timing": {"infer_ms": infer_ms, "queue_ms": max(0.0, total_ms - infer_ms)}}

    async def _send(self, connection: ServerConnection, message: str | bytes) -> None:
        try:
            await asyncio.wait_for(connection.send(message), self.config.send_timeout_s)
        except TimeoutError:
            connection.transport.abort()  # a closing handshake would wait for the peer that does not read
            raise


def serve_forever(config: ServeConfig) -> None:
    """Load the policy and serve it until SIGINT or SIGTERM."""
    from training.export import load_policy

    server = PolicyServer(
        load_policy(config.model, provider=config.provider), config, token=os.environ.get(TOKEN_VARIABLE, "")
    )
    asyncio.run(_until_stopped(server))


async def _until_stopped(server: PolicyServer) -> None:
    stopped = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stopped.set)
    listening = await server.start()
    host, port = next(iter(listening.sockets)).getsockname()[:2]
    log.info("serving %s on ws://%s:%d, health at http://%s:%d%s", server.config.model, host, port, host, port, HEALTH)
    await stopped.wait()
    log.info("stopping: %d observations were answered", server.answered)
    listening.close()
    await listening.wait_closed()
    server.stop()


def _has_token(request: Request, token: str) -> bool:
    given = " ".join(request.headers.get_all("Authorization")).encode(errors="surrogateescape")  # any bytes, any number
    return any(hmac.compare_digest(given, f"{scheme} {token}".encode()) for scheme in ("Api-Key", "Bearer"))


def _cameras(policy: Policy) -> tuple[str, ...]:
    if not policy.needs_images:
        return ()
    return tuple(getattr(policy, "cameras", ()) or (getattr(policy, "camera", "main"),))


def _state_dim(policy: Policy) -> int:
    """The width of the state a policy reads, where its config tells."""
    config = getattr(policy, "config", None)
    for part in ("denoiser", "head", "network"):
        width = getattr(getattr(config, part, None), "proprioception_dim", None)
        if isinstance(width, int):
            return width
    return 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
