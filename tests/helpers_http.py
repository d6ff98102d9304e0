"""A real web server on loopback whose answers a test plants, and which counts what it was asked."""

from __future__ import annotations

import datetime
import http.server
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[["http.server.BaseHTTPRequestHandler"], None]


class Site:
    """`routes` maps a path to what answers it; everything else is a 404. `hits` counts requests by path."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.hits: Counter[str] = Counter()
        self.heads: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self.connections = 0
        self.lock = threading.Lock()
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def serve(self, path: str, data: bytes, *, content_type: str = "video/mp4") -> str:
        self.routes[path] = lambda handler: send(handler, 200, data, {"Content-Type": content_type})
        return self.url(path)


def send(handler, status: int, data: bytes = b"", headers=None, *, length: int | None = None) -> None:
    """A whole answer; `length` declares another one than the body has."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data) if length is None else length), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def raw(handler, data: bytes) -> None:
    handler.wfile.write(data)
    handler.wfile.flush()


def trickle(handler, head: bytes, *, every_s: float = 0.05, byte: bytes = b"x") -> None:
    """A head, then a byte at a time until the other side is gone."""
    raw(handler, head)
    while True:
        raw(handler, byte)
        time.sleep(every_s)


@contextmanager
def site(context: ssl.SSLContext | None = None) -> Iterator[Site]:
    """Running on a free port of 127.0.0.1 until the block ends."""
    here = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with here.lock:
                here.hits[path] += 1
                here.heads.append(dict(self.headers))
                here.busy += 1
                here.busiest = max(here.busiest, here.busy)
            try:
                with suppress(OSError):
                    here.routes.get(path, lambda handler: send(handler, 404))(self)
            finally:
                with here.lock:
                    here.busy -= 1
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def process_request(self, request, client_address):
            here.connections += 1
            super().process_request(request, client_address)

        def finish_request(self, request, client_address):
            with suppress(OSError):  # a client that refuses our certificate
                wrapped = context.wrap_socket(request, server_side=True) if context else request
                super().finish_request(wrapped, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    here.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()


def certificate(tmp_path: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server context, client context that trusts it): one self-signed certificate for `name`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / f"{name}.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=str(pem))
