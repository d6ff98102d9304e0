"""The server behind `foreframe view`: GET only, loopback only, for the one page it serves and nobody else's.

It is the standard library's: every answer is one blocking read of a file, and nothing here needs an event loop, a
router, or a package that only comes along with others.
"""

from __future__ import annotations

import logging
import re
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from evaluation.report.text import visible
from evaluation.view.api import NotReadYetError
from evaluation.view.media import UnsatisfiableError
from evaluation.view.site import Answer, Site, refusal
from infra.errors import ForeframeError, InputError, ServiceError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# A page of another name that resolves to this address (DNS rebinding) would name itself here.
HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
IDLE_TIMEOUT_S = 60.0


class Viewer:
    """A data set on a loopback port; `port` 0 takes any free one. Use as a context: leaving it frees everything."""

    def __init__(self, url: str, *, port: int = 0) -> None:
        self.site = Site(url)
        try:
            self._server = _Server((LOOPBACK, port), self)
        except OSError as error:
            raise ServiceError(
                f"port {port} cannot be used: {error}.", remedy="Use --port 0 for any free one."
            ) from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}/"

    def __enter__(self) -> Viewer:
        self.site.api.table.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()
        self.site.api.table.stop()

    def serve(self) -> None:
        """Answer until `shutdown`, or until an exception such as KeyboardInterrupt ends it."""
        self._server.serve_forever(poll_interval=0.2)

    def shutdown(self) -> None:
        """End `serve` from another thread."""
        self._server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # Ctrl-C does not wait for a browser that keeps its connection
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], viewer: Viewer) -> None:
        self.viewer = viewer
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that breaks off a video is no event; the rest belongs in the log, not on the peer's page."""
        log.debug("view: a connection ended", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]) or not self.path.startswith("/"):
            self.send_error(HTTPStatus.FORBIDDEN, "This server answers to loopback names only.")
            return
        try:
            self._send(self.server.viewer.site.answer(self.path, self.headers.get("Range", "")))
        except UnsatisfiableError as error:
            headers = {"Content-Range": f"bytes */{error.num_bytes}"}
            self._send(refusal(str(error), HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers))
        except NotReadYetError as error:
            self._send(refusal(str(error), HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"}))
        except InputError as error:  # ours, or the reader's about a frame or camera it does not know
            self._send(refusal(str(error), HTTPStatus.NOT_FOUND))
        except (ForeframeError, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise  # the browser went away in the middle
            log.warning("view: %s", error)
            self._send(refusal(str(error), HTTPStatus.INTERNAL_SERVER_ERROR))

    def _send(self, answer: Answer) -> None:
        body = [answer.body] if isinstance(answer.body, bytes) else answer.body
        num_bytes = len(answer.body) if isinstance(answer.body, bytes) else answer.num_bytes
        self.send_response(answer.status)
        for name, value in {**HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("Cache-Control", answer.caching)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in body:
                self.wfile.write(piece)
        except ForeframeError as error:  # too late for another status
            log.warning("view: %s", error)
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Every refusal, the library's own among them (malformed requests, methods without an answer)."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        headers = {"Allow": "GET"} if status is HTTPStatus.METHOD_NOT_ALLOWED else {}
        self.close_connection = True  # the body of a refused request is not read
        self._send(refusal(status.phrase if headers else message or status.phrase, status, headers))

    def version_string(self) -> str:
        """No versions for the peer."""
        return "foreframe"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are for `--debug`."""
        log.debug("view: %s", visible(format % args))

    def setup(self) -> None:
        """Small answers leave at once."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
