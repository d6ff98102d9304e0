"""A proxy before an S3 endpoint that fails on purpose: errors, broken answers, and answers lost after the deed."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from unittest import mock
from urllib.parse import urlsplit

import boto3
import s3fs
from moto.server import ThreadedMotoServer

from tests.fixtures_s3 import ENVIRONMENT

READ_TIMEOUT_S = 1.0
ERRORS = {
    "error": (500, "InternalError"),
    "slow down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),  # of conditional puts only
}
# The request is done, and then its answer: broken off, cut, late, or lost altogether.
BROKEN = ("reset", "cut", "late", "lost")
KINDS = ("error", "slow down", "undone", *BROKEN)  # undone: no answer, and nothing was done either
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultyProxy:
    """`address` stands for `endpoint`; a share `rate` of its requests fails, by a seeded draw."""

    def __init__(self, endpoint: str, *, rate: float, seed: int) -> None:
        self.rate = rate
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._random, self._lock = Random(seed), threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(endpoint).netloc))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def draw(self, *, conditional: bool) -> str:
        """The fault of the next request, or ""."""
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.rate:
                return ""
            kind = self._random.choice((*KINDS, "conflict") if conditional else KINDS)
            self.faults[kind] += 1
            return kind

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: FaultyProxy, upstream: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            self.close_connection = False
            data = self._body()
            fault = proxy.draw(conditional="If-None-Match" in self.headers)
            if fault in ERRORS:
                self._refuse(*ERRORS[fault])
            elif fault == "undone":
                self._break()
            else:
                self._pass(data, fault)

        def _pass(self, data: bytes, fault: str) -> None:
            connection = http.client.HTTPConnection(upstream, timeout=60)
            try:
                connection.request(self.command, self.path, body=data or None, headers=dict(self.headers.items()))
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
            if fault == "late":
                time.sleep(READ_TIMEOUT_S * 1.5)
            if fault in ("late", "lost"):
                self._break()
                return
            length = response.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            lines = [f"HTTP/1.1 {response.status} {response.reason}", f"Content-Length: {length}"]
            lines += [f"{key}: {value}" for key, value in response.headers.items() if key.lower() not in HOP_BY_HOP]
            answer = "\r\n".join([*lines, "", ""]).encode() + content
            if fault:
                # Half of what carries the answer: the body, or the head where there is none.
                self.wfile.write(answer[: len(answer) - (len(content) + 1) // 2 if content else len(answer) // 2])
                self._break(reset=fault == "reset")
                return
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            return b"".join(pieces)

        def _refuse(self, status: int, code: str) -> None:
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _break(self, *, reset: bool = False) -> None:
            self.wfile.flush()
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, *_):
            pass

    return Handler


@contextlib.contextmanager
def own_moto() -> Iterator[str]:
    """The address of an S3 endpoint for a command; its credentials and address are in the environment meanwhile."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        with mock.patch.dict(os.environ, {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}):
            yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def faulty(endpoint: str, *, rate: float, seed: int) -> Iterator[FaultyProxy]:
    """Within the block `infra.storage` talks to the endpoint through a proxy, and waits a second for an answer."""
    proxy = FaultyProxy(endpoint, rate=rate, seed=seed)
    short = mock.patch.multiple(s3fs.S3FileSystem, read_timeout=READ_TIMEOUT_S, connect_timeout=READ_TIMEOUT_S)
    with short, mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.address}):
        try:
            yield proxy
        finally:
            proxy.close()


def make_bucket(endpoint: str, name: str) -> str:
    """`s3://name`, made without the proxy."""
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return f"s3://{name}"
