"""Addresses of strangers: taken apart once, their host looked up once, and refused where they lead inside.

What was checked is what is connected to: a `Place` holds the very internet addresses that were looked at, so a name
server that answers otherwise the second time is never asked a second time.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from dataclasses import dataclass

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from infra.errors import DownloadError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_ADDRESS_LENGTH = 8192  # characters
MAX_SHOWN_LENGTH = 200  # characters
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")  # what splits a header, or what parsers read differently
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")

ALLOW = "FOREFRAME_DOWNLOAD_ALLOW_HOSTS=host:port allows a mirror of your own"
# Beyond what `ipaddress` calls private, loopback, link-local, multicast, reserved or unspecified.
CLOSED_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT; clouds keep services there
        "168.63.129.16/32",  # Azure's host agent, under a public number
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
    )
)
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Place:
    """Where one request goes: `host` as the certificate names it, `target` the path and query, numbers in order."""

    scheme: str
    host: str
    port: int
    target: str
    numbers: tuple[IPAddress, ...]

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == DEFAULT_PORTS[self.scheme] else f"{name}:{self.port}"


def locate(url: str, *, ports: tuple[int, ...], allow_hosts: frozenset[str] = frozenset()) -> Place:
    """Take an http(s) address apart and look its host up, once.

    `allow_hosts` holds `host:port` pairs that may be private and may have any port. Raises `DownloadError`:
    "download_refused" for what must not be asked, "download_failed" where the name server gives no answer.
    """
    if len(url) > MAX_ADDRESS_LENGTH:
        raise _refused(url, f"it is longer than {MAX_ADDRESS_LENGTH} characters")
    if FORBIDDEN.search(url):
        raise _refused(url, "it holds control characters or a backslash")
    try:
        parsed = parse_url(url)
    except LocationParseError:
        raise _refused(url, "it is malformed") from None
    if parsed.scheme not in DEFAULT_PORTS:
        raise _refused(url, "only http, https and s3 are fetched")
    if parsed.auth is not None:
        raise _refused(url, "it holds a user name or password")
    host = (parsed.host or "").strip("[]").rstrip(".").lower()
    if not host or "%" in host:
        raise _refused(url, "it names no host")
    port = DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    is_allowed = f"{host}:{port}" in allow_hosts
    if not is_allowed and port not in ports:
        raise _refused(url, f"port {port} is not one of {', '.join(map(str, ports))}; {ALLOW}")
    if _is_oddly_spelt(host):
        raise _refused(url, "its host is a number in an unusual spelling")
    numbers = _look_up(url, host, port)
    closed = [number for number in numbers if not is_public(number)]
    if closed and not is_allowed:
        raise _refused(url, f"its host lies in a private or reserved network; {ALLOW}")
    return Place(parsed.scheme, host, port, parsed.request_uri, numbers)


def is_public(number: IPAddress) -> bool:
    """Whether an internet address belongs to the open internet, also when it wraps an IPv4 one."""
    if isinstance(number, ipaddress.IPv6Address):
        if number.ipv4_mapped is not None:
            return is_public(number.ipv4_mapped)
        if number in NAT64:
            return is_public(ipaddress.IPv4Address(int(number) & 0xFFFFFFFF))
        if number not in GLOBAL_IPV6 or (number.sixtofour is not None and not is_public(number.sixtofour)):
            return False
    elif any(number in network for network in CLOSED_IPV4):
        return False
    return number.is_global and not (
        number.is_multicast or number.is_reserved or number.is_unspecified or number.is_loopback or number.is_link_local
    )


def shown(url: str) -> str:
    """An address for logs and ledgers: no user, query or fragment, which may hold secrets; nothing a terminal obeys."""
    text = neutral(re.split(r"[?#]", url, maxsplit=1)[0])
    text = re.sub(r"(^|//)[^/]*@", r"\1", text)
    return text if len(text) <= MAX_SHOWN_LENGTH else text[: MAX_SHOWN_LENGTH - 1] + "…"


def neutral(text: str) -> str:
    """Text of a stranger with `?` for each control, format, surrogate or line-separating character."""
    return "".join("?" if unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else letter for letter in text)


def host_of(url: str) -> str:
    """`host:port` for queues and limits, "" where there is none; says nothing about whether it may be asked."""
    if url.startswith("s3://"):
        return url[len("s3://") :].partition("/")[0]
    try:
        parsed = parse_url(url)
    except LocationParseError:
        return ""
    return f"{(parsed.host or '').rstrip('.')}:{parsed.port or DEFAULT_PORTS.get(parsed.scheme or '', 0)}"


def _is_oddly_spelt(host: str) -> bool:
    """`2130706433`, `0x7f.1`, `0177.0.0.1`: resolvers take them for numbers, and not all for the same."""
    if not NUMBER.fullmatch(host.rpartition(".")[2]):
        return False
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return True
    return False


def _look_up(url: str, host: str, port: int) -> tuple[IPAddress, ...]:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        again = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise DownloadError(f"{shown(url)}: its host is not known.", retryable=again) from None
    # A zone (`fe80::1%2`) belongs to a link-local address, which is refused without it as well.
    numbers = [ipaddress.ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers]
    if not numbers:
        raise DownloadError(f"{shown(url)}: its host has no address.")
    return tuple(dict.fromkeys(numbers))


def _refused(url: str, why: str) -> DownloadError:
    return DownloadError(f"{shown(url)} is not fetched: {why}.", reason="download_refused")
