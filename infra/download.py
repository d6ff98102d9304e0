"""One file from an address of a stranger: bounded in time, bytes, redirects and attempts; complete or not at all.

Every hop is checked by `infra.addresses` and the connection goes to the internet address that was checked, with the
host's own name in the Host header, in SNI and in the certificate check. Proxies, cookies and credentials are not used.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from infra.addresses import FORBIDDEN, IPAddress, Place, locate, neutral, shown
from infra.digests import sha256_file
from infra.errors import DownloadError, InputError, StorageError
from infra.storage import get_file, size_bytes

# Its warnings about malformed headers print whole addresses, queries included.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)

CHUNK_BYTES = 1 << 18
REDIRECTS = frozenset({301, 302, 303, 307, 308})
GONE = frozenset({404, 410})
PASSING = frozenset({408, 425, 429})  # and every 5xx
HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close", "User-Agent": "foreframe"}
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class DownloadPolicy:
    """Bounds of a download. `deadline_s` is for one attempt from its first look-up to its last byte.

    `allow_hosts` holds `host:port` pairs that may lie in a private network and may have any port.
    """

    max_bytes: int = 2 << 30
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    deadline_s: float = 1800.0
    max_redirects: int = 3
    max_attempts: int = 4
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0  # also of what a Retry-After header may ask
    ports: tuple[int, ...] = (80, 443)
    allow_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Downloaded:
    """A complete file: hex sha256, size in bytes, and the server's Content-Type without parameters ("" if none)."""

    sha256: str
    size_bytes: int
    content_type: str = ""


def download(url: str, target: Path, policy: DownloadPolicy) -> Downloaded:
    """Fetch an http(s) or `s3://` address into `target`, with retries of what may pass. Raises `DownloadError`."""
    for attempt in range(policy.max_attempts):
        try:
            return download_once(url, target, policy, attempt=attempt)
        except DownloadError as error:
            if not error.retryable or attempt + 1 == policy.max_attempts:
                raise
            time.sleep(delay_s(error, policy, attempt))
    raise AssertionError("max_attempts is at least 1")


def download_once(
    url: str, target: Path, policy: DownloadPolicy, *, attempt: int = 0, stop: threading.Event | None = None
) -> Downloaded:
    """One attempt; `attempt` (from 0) picks among the addresses of a host that has several.

    Once `stop` is set it gives up with the next bytes that come, at the latest when a read times out. Raises
    `DownloadError`, `retryable` where another attempt may help, and `StorageError` when the disk refuses.
    """
    if url.startswith("s3://"):
        return _copy_object(url, target, policy)
    here, ends = url, time.monotonic() + policy.deadline_s
    try:
        for _ in range(policy.max_redirects + 1):
            place = locate(here, ports=policy.ports, allow_hosts=policy.allow_hosts)
            number = place.numbers[attempt % len(place.numbers)]
            watch = _Watch(ends, stop)
            with _exchange(place, number, here, policy, watch) as response:
                if response.status not in REDIRECTS:
                    return _save(response, watch, here, target, policy)
                where = response.headers.get("Location")
            if not where:
                raise DownloadError(f"{shown(here)}: a redirect that names no address.")
            here = _next(here, where)
    except DownloadError as error:
        if here != url:
            error.message = f"{shown(url)} leads on: {error.message}"
            error.args = (error.message,)
        raise
    raise DownloadError(f"{shown(url)}: more than {policy.max_redirects} redirects.", reason="download_refused")


def delay_s(error: DownloadError, policy: DownloadPolicy, attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 0): what the server asks, else doubling, jittered."""
    if error.retry_after_s is not None:
        return min(max(error.retry_after_s, policy.first_delay_s), policy.max_delay_s)
    doubled = policy.first_delay_s * 2**attempt * (0.5 + random.random())  # noqa: S311  (jitter, not a draw)
    return min(doubled, policy.max_delay_s)


def _next(here: str, where: str) -> str:
    """The address a redirect names. Headers come as Latin-1, addresses of today are UTF-8."""
    with contextlib.suppress(UnicodeError):
        where = where.encode("latin-1").decode()
    try:
        return urljoin(here, where)
    except ValueError:
        raise DownloadError(f"{shown(here)}: a redirect to a malformed address.", reason="download_refused") from None


class _Watch:
    """Cuts a connection at the deadline: timeouts of single reads never end a server that sends a byte a second."""

    def __init__(self, ends: float, stop: threading.Event | None) -> None:
        self.ends = ends
        self._stop = stop
        self._sock: socket.socket | None = None
        self._timer: threading.Timer | None = None

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends or (self._stop is not None and self._stop.is_set())

    @property
    def remaining_s(self) -> float:
        return max(self.ends - time.monotonic(), 0.001)

    def start(self, sock: socket.socket) -> None:
        self._sock = sock
        self._timer = threading.Timer(self.remaining_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _cut(self) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _exchange(
    place: Place, number: IPAddress, url: str, policy: DownloadPolicy, watch: _Watch
) -> Iterator[urllib3.BaseHTTPResponse]:
    """Ask and read the head of the answer; the connection closes with the block."""
    connection = _connection(place, number, min(policy.connect_timeout_s, watch.remaining_s))
    try:
        with _translated(url, watch):
            connection.connect()
            assert connection.sock is not None
            watch.start(connection.sock)
            connection.timeout = policy.read_timeout_s
            headers = {"Host": place.authority, **HEADERS}
            connection.request("GET", place.target, headers=headers, preload_content=False, decode_content=False)
            response = connection.getresponse()
        try:
            yield response
        finally:
            response.close()
    finally:
        watch.cancel()
        connection.close()


def _connection(place: Place, number: IPAddress, timeout_s: float) -> HTTPConnection:
    if place.scheme == "http":
        return HTTPConnection(str(number), place.port, timeout=timeout_s)
    return HTTPSConnection(
        str(number), place.port, timeout=timeout_s, server_hostname=place.host, ssl_context=_tls_context()
    )


@lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    """Certificates and names are checked; reading the system's certificates once saves 20 ms a connection."""
    return ssl.create_default_context()


@contextlib.contextmanager
def _translated(url: str, watch: _Watch) -> Iterator[None]:
    """Errors of the network in our words: the libraries' own may hold whole addresses."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        why = neutral(error.verify_message)
        raise DownloadError(f"{shown(url)}: its certificate is not accepted ({why}).") from None
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
        if watch.is_over:
            raise _too_slow(url) from None
        raise DownloadError(f"{shown(url)}: {_words(error)}.", retryable=True) from None


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError):
        return "it did not answer in time"
    if isinstance(error, urllib3.exceptions.NewConnectionError | ConnectionRefusedError):
        return "no connection"
    if isinstance(error, ssl.SSLError):
        return "no TLS connection"
    if isinstance(error, urllib3.exceptions.IncompleteRead) or "IncompleteRead" in str(error):
        return "the body ends before its declared length"
    return "the connection broke, or what came was no HTTP"


def _save(
    response: urllib3.BaseHTTPResponse, watch: _Watch, url: str, target: Path, policy: DownloadPolicy
) -> Downloaded:
    """Stream the body into a temporary sibling of `target`, then rename."""
    _check_head(response, url, policy)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as stream:
            for chunk in _chunks(response, watch, url):
                size += len(chunk)
                if size > policy.max_bytes:
                    raise _too_large(url, policy)
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or 'cannot be written'}.", remedy="Is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Downloaded(digest.hexdigest(), size, _content_type(response))


def _chunks(response: urllib3.BaseHTTPResponse, watch: _Watch, url: str) -> Iterator[bytes]:
    """The body as it arrives, raising at its end if that came too early or too late."""
    while True:
        with _translated(url, watch):
            chunk = response.read1(CHUNK_BYTES)
        # A cut connection looks like the end of a body without a declared length.
        if watch.is_over:
            raise _too_slow(url)
        if not chunk:
            return
        yield chunk


def _check_head(response: urllib3.BaseHTTPResponse, url: str, policy: DownloadPolicy) -> None:
    status = response.status
    if status in GONE:
        raise DownloadError(f"{shown(url)}: status {status}.", reason="not_found")
    if status != http.client.OK:
        passing = status in PASSING or status >= http.client.INTERNAL_SERVER_ERROR
        wait = _retry_after(response.headers.get("Retry-After", "")) if passing else None
        raise DownloadError(f"{shown(url)}: status {status}.", retryable=passing, retry_after_s=wait)
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in {"", "identity"}:
        raise DownloadError(f"{shown(url)}: the server compresses although it was asked not to.")
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared[:20]) > policy.max_bytes:
        raise _too_large(url, policy)


def _retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header: a number or a date."""
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _content_type(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _copy_object(url: str, target: Path, policy: DownloadPolicy) -> Downloaded:
    """An object of a store that the environment's credentials may read."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket) or not key or FORBIDDEN.search(url):
        raise DownloadError(f"{shown(url)} is not fetched: it names no object.", reason="download_refused")
    try:
        if size_bytes(url) > policy.max_bytes:
            raise _too_large(url, policy)
        get_file(url, target)
    except InputError:
        raise DownloadError(f"{shown(url)}: there is no such object.", reason="not_found") from None
    except PermissionError:
        raise DownloadError(f"{shown(url)}: the store denies access.") from None
    except StorageError:  # after attempts of its own
        raise DownloadError(f"{shown(url)}: the store does not answer.") from None
    return Downloaded(sha256_file(target), target.stat().st_size)


def _too_large(url: str, policy: DownloadPolicy) -> DownloadError:
    return DownloadError(f"{shown(url)}: larger than {policy.max_bytes} bytes.", reason="download_refused")


def _too_slow(url: str) -> DownloadError:
    return DownloadError(f"{shown(url)}: not complete at the deadline.")
