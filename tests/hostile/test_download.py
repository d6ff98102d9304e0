"""Addresses of strangers: what must not be asked is not asked, and what does not end is ended."""

import datetime
import ipaddress
import logging
import pickle
import socket
import time
from dataclasses import replace

import pytest

from infra import download as module
from infra.addresses import Place, is_public, locate, neutral, shown
from infra.digests import sha256_bytes
from infra.download import DownloadPolicy, delay_s, download, download_once
from infra.errors import DownloadError
from tests.helpers_http import certificate, raw, send, site, trickle

BODY = bytes(range(256)) * 4000
QUICK = DownloadPolicy(
    connect_timeout_s=2, read_timeout_s=2, deadline_s=10, first_delay_s=0.01, max_delay_s=0.05, max_attempts=3
)


@pytest.fixture
def web():
    with site() as here:
        yield here


@pytest.fixture
def policy(web):
    return replace(QUICK, allow_hosts=frozenset({web.host}))


@pytest.fixture
def names(monkeypatch):
    """Host name -> list of answers, one a look-up, the last for ever; other names go to the real resolver."""
    table: dict[str, list[list[str]]] = {}
    asked: list[str] = []
    real = socket.getaddrinfo

    def fake(host, port, *args, **kwargs):
        if host not in table:
            return real(host, port, *args, **kwargs)
        asked.append(host)
        answers = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in answers]

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    table["asked"] = asked
    return table


def refused(url, tmp_path, policy=QUICK, *, reason="download_refused") -> str:
    target = tmp_path / "file"
    with pytest.raises(DownloadError) as caught:
        download(url, target, policy)
    assert caught.value.reason == reason, caught.value
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def test_a_file_arrives_whole(web, policy, tmp_path):
    url = web.serve("/a/clip.mp4", BODY, content_type="Video/MP4; codecs=avc1")
    done = download(url, tmp_path / "new" / "clip", policy)
    assert (tmp_path / "new" / "clip").read_bytes() == BODY
    assert (done.sha256, done.size_bytes, done.content_type) == (sha256_bytes(BODY), len(BODY), "video/mp4")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip"]
    head = web.heads[0]
    assert head["Host"] == web.host and head["Accept-Encoding"] == "identity"
    assert "Authorization" not in head and "Cookie" not in head


def test_chunks_and_bodies_without_length_arrive_whole(web, policy, tmp_path):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n3\r\n yo\r\n0\r\n\r\n"
    web.routes["/chunked"] = lambda handler: raw(handler, chunked)
    web.routes["/open"] = lambda handler: raw(handler, b"HTTP/1.0 200 OK\r\n\r\nhello yo")
    for path in ("/chunked", "/open"):
        download(web.url(path), tmp_path / "file", policy)
        assert (tmp_path / "file").read_bytes() == b"hello yo"


INSIDE = """
0.0.0.0 10.1.2.3 127.0.0.1 127.9.9.9 169.254.169.254 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 100.100.100.200
192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 240.0.0.1 255.255.255.255
168.63.129.16 :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 ::8.8.8.8 ::ffff:0:8.8.8.8 fe80::1 fec0::1 fc00::1
fd00:ec2::254 ff02::1 64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b:1::808:808 2002:7f00:1:: 2002:a00:1::1 2002:c0a8:101::
2001::1 2001:db8::1 100::1 5f00::1
"""
OUTSIDE = "8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"


@pytest.mark.parametrize("number", INSIDE.split())
def test_numbers_inside_are_closed(number):
    assert not is_public(ipaddress.ip_address(number))


@pytest.mark.parametrize("number", OUTSIDE.split())
def test_numbers_outside_are_open(number):
    assert is_public(ipaddress.ip_address(number))


def test_private_spellings_reach_nothing(web, tmp_path):
    """The server listens; whatever is not named in `allow_hosts` must not get to it."""
    port = web.port
    anywhere = replace(QUICK, ports=(port,))
    hosts = "127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 017700000001 localhost localhost."
    hosts += (
        " LOCALHOST [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::] 0.0.0.0 0 %31%32%37.0.0.1 127.0.0.1. [fe80::1%25lo]"
    )
    for host in hosts.split():
        refused(f"http://{host}:{port}/x", tmp_path, anywhere)
    assert web.connections == 0


def test_odd_spellings_are_refused_even_where_public(tmp_path):
    for host in ("134744072", "0x8.8.8.8", "010.8.8.8", "8.8.2056", "a.0x8"):
        assert "unusual spelling" in refused(f"http://{host}/x", tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a.mp4",
        "gopher://example.com/",
        "data:video/mp4,xx",
        "concat:a|b",
        "//example.com/x",
        "http:///x",
        "http://",
        "http://8.8.8.8:22/x",
        "https://8.8.8.8:8443/x",
        "http://8.8.8.8:99999/x",
        "http://user:password@8.8.8.8/x",
        "http://user@8.8.8.8/x",
        "http://8.8.8.8\\@127.0.0.1/x",
        "http://8.8.8.8/x\r\nHost: inside",
        "http://8.8.8.8/x y\nz",
        "http://8.8.8.8/\x00",
        "http://[::1/x",
        "http://8.8.8.8/" + "a" * 9000,
        "s3://Bad_Bucket/x",
        "s3://bucket",
        "s3://bucket/a\nb",
        "",
    ],
)
def test_what_is_no_plain_address_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # any attempt to connect would be a TypeError
    refused(url, tmp_path)


def test_one_private_answer_among_public_ones_closes_the_host(names, tmp_path):
    names["mixed.test"] = [["8.8.8.8", "10.0.0.1"]]
    assert "private" in refused("http://mixed.test/x", tmp_path)


def test_a_name_is_looked_up_once_and_the_connection_goes_there(web, names, tmp_path):
    """Rebinding: public at the check, loopback afterwards. The second answer must never be asked for."""
    names["rebind.test"] = [["203.0.113.9"], ["127.0.0.1"]]
    names["asked"].clear()
    checked = []
    connect = replace(QUICK, ports=(web.port,), connect_timeout_s=0.2, max_attempts=1)
    original = module.locate

    def locate_as_public(url, **kwargs):
        place = original(url, **{**kwargs, "allow_hosts": frozenset({f"rebind.test:{web.port}"})})
        checked.append(place)
        return place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "locate", locate_as_public)  # the documentation network plays the public address
        refused(f"http://rebind.test:{web.port}/x", tmp_path, connect, reason="download_failed")
    assert names["asked"] == ["rebind.test"]
    assert [str(number) for number in checked[0].numbers] == ["203.0.113.9"]
    assert web.connections == 0
    refused(f"http://rebind.test:{web.port}/x", tmp_path, connect)  # the next attempt is checked again
    assert web.connections == 0


def test_the_host_header_is_the_name(web, names, tmp_path):
    names["named.test"] = [["127.0.0.1"]]
    web.serve("/x", BODY)
    allowed = replace(QUICK, allow_hosts=frozenset({f"named.test:{web.port}"}))
    download(f"http://NAMED.test:{web.port}/x?a=b#c", tmp_path / "file", allowed)
    assert web.heads[0]["Host"] == f"named.test:{web.port}"
    assert locate("http://8.8.8.8/", ports=(80,)).authority == "8.8.8.8"


def test_allowing_one_port_allows_no_other(web, policy, tmp_path):
    with site() as other:
        refused(other.url("/x"), tmp_path, policy)
        assert other.connections == 0


def test_a_redirect_inside_is_refused_before_any_request(web, policy, tmp_path):
    with site() as inside:
        inside.serve("/secret", b"secret")
        for code in (301, 302, 303, 307, 308):
            web.routes["/go"] = lambda handler, code=code: send(
                handler, code, headers={"Location": inside.url("/secret")}
            )
            message = refused(web.url("/go"), tmp_path, policy)
            assert web.url("/go") in message and inside.host in message
        assert inside.connections == 0
    places = (
        "file:///etc/passwd",
        "s3://bucket/key",
        "ftp://8.8.8.8/x",
        "http://[::1/",
        "http://169.254.169.254/latest",
    )
    for place in places:
        web.routes["/go"] = lambda handler, place=place: send(handler, 302, headers={"Location": place})
        refused(web.url("/go"), tmp_path, policy)


def test_three_redirects_are_followed_and_a_fourth_is_not(web, policy, tmp_path):
    for number in range(4):
        there = "/end" if number == 3 else f"hop{number + 1}?x=y"
        web.routes[f"/hop{number}"] = lambda handler, there=there: send(handler, 302, headers={"Location": there})
    web.serve("/end", BODY)
    download(web.url("/hop1"), tmp_path / "file", policy)
    (tmp_path / "file").unlink()
    assert "more than 3 redirects" in refused(web.url("/hop0"), tmp_path, policy)
    web.routes["/lost"] = lambda handler: send(handler, 302)
    refused(web.url("/lost"), tmp_path, policy, reason="download_failed")


def test_bodies_over_the_limit_are_refused(web, policy, tmp_path):
    small = replace(policy, max_bytes=1000)
    web.serve("/exact", b"x" * 1000)
    assert download(web.url("/exact"), tmp_path / "file", small).size_bytes == 1000
    (tmp_path / "file").unlink()
    web.routes["/declared"] = lambda handler: send(handler, 200, b"", length=1001)
    refused(web.url("/declared"), tmp_path, small)
    web.routes["/endless"] = lambda handler: trickle(handler, b"HTTP/1.0 200 OK\r\n\r\n", every_s=0, byte=b"x" * 500)
    refused(web.url("/endless"), tmp_path, small)
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    web.routes["/chunks"] = lambda handler: trickle(handler, chunks, every_s=0, byte=b"10\r\n0123456789abcdef\r\n")
    refused(web.url("/chunks"), tmp_path, small)
    assert web.hits == {"/exact": 1, "/declared": 1, "/endless": 1, "/chunks": 1}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["status", "header", "body", "open body", "chunk size"],
)
def test_a_byte_now_and_then_ends_at_the_deadline(web, policy, tmp_path, head):
    web.routes["/slow"] = lambda handler: trickle(handler, head, byte=b"1")
    started = time.monotonic()
    message = refused(web.url("/slow"), tmp_path, replace(policy, deadline_s=0.6), reason="download_failed")
    assert "deadline" in message and web.hits["/slow"] == 1
    assert time.monotonic() - started < 5  # without the watch it would be for ever


def test_silence_ends_at_the_read_timeout_and_is_tried_again(web, policy, tmp_path):
    web.routes["/silent"] = lambda handler: time.sleep(3)
    quick = replace(policy, read_timeout_s=0.2)
    assert "in time" in refused(web.url("/silent"), tmp_path, quick, reason="download_failed")
    assert web.hits["/silent"] == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"",
        b"this is not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n",
    ],
    ids=["short", "short chunk", "no last chunk", "nothing", "no HTTP", "two lengths", "many headers", "long header"],
)
def test_broken_answers_fail_after_all_attempts(web, policy, tmp_path, answer):
    web.routes["/x"] = lambda handler: raw(handler, answer)
    refused(web.url("/x"), tmp_path, policy, reason="download_failed")
    assert web.hits["/x"] == 3


def test_a_short_body_is_mended_by_the_next_attempt(web, policy, tmp_path):
    def once_short(handler):
        send(handler, 200, BODY[:5000] if web.hits["/x"] == 1 else BODY, length=len(BODY))

    web.routes["/x"] = once_short
    download(web.url("/x"), tmp_path / "file", policy)
    assert (tmp_path / "file").read_bytes() == BODY and web.hits["/x"] == 2


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_gone_is_asked_once(web, policy, tmp_path, status):
    web.routes["/x"] = lambda handler: send(handler, status)
    refused(web.url("/x"), tmp_path, policy, reason="not_found")
    assert web.hits["/x"] == 1


@pytest.mark.parametrize(
    ("status", "attempts"), [(400, 1), (401, 1), (403, 1), (418, 1), (206, 1), (204, 1), (429, 3), (500, 3), (503, 3)]
)
def test_which_statuses_are_tried_again(web, policy, tmp_path, status, attempts):
    web.routes["/x"] = lambda handler: send(handler, status)
    refused(web.url("/x"), tmp_path, policy, reason="download_failed")
    assert web.hits["/x"] == attempts


def test_retry_after_is_heard_and_bounded(web, policy, tmp_path):
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)
    date = later.strftime("%a, %d %b %Y %H:%M:%S GMT")
    for value, low, high in (
        ("7", 7, 7),
        ("999999999999", 60, 60),
        (date, 30, 40),
        ("soon", 0.5, 1.5),
        ("-5", 0.5, 1.5),
    ):
        web.routes["/x"] = lambda handler, value=value: send(handler, 429, headers={"Retry-After": value})
        with pytest.raises(DownloadError) as caught:
            download_once(web.url("/x"), tmp_path / "file", policy)
        assert low <= delay_s(caught.value, DownloadPolicy(), 0) <= high, value


def test_compression_that_was_not_asked_for_is_no_video(web, policy, tmp_path):
    web.routes["/x"] = lambda handler: send(handler, 200, BODY, {"Content-Encoding": "gzip"})
    refused(web.url("/x"), tmp_path, policy, reason="download_failed")


def test_an_unknown_host_fails(tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused("http://nowhere.invalid/x", tmp_path, reason="download_failed")


def test_proxies_of_the_environment_are_not_used(web, policy, tmp_path, monkeypatch):
    with site() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        web.serve("/x", BODY)
        download(web.url("/x"), tmp_path / "file", policy)
        assert proxy.connections == 0


def test_messages_and_logs_hold_no_secret_and_no_escape(web, policy, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    web.routes["/x"] = lambda handler: raw(handler, b"HTTP/1.1 403 No\r\nbad header\r\nY: canary\r\n\r\n")
    message = refused(web.url("/x") + "?token=canary#canary", tmp_path, policy, reason="download_failed")
    assert "canary" not in message + caplog.text
    assert "canary" not in refused("http://canary:canary@8.8.8.8/x", tmp_path)
    assert "canary" not in refused("canary:canary@8.8.8.8/x", tmp_path)
    evil = refused("http://8.8.8.8/\x1b[2J\u202egpj\r\nINFO all is well\x9b", tmp_path)
    assert evil == neutral(evil) and "\x1b" not in evil and "\u202e" not in evil and "\n" not in evil
    assert len(shown("http://h/" + "a" * 9000)) <= 200


def test_the_error_survives_a_process_boundary():
    error = DownloadError("said", reason="not_found", retryable=True, retry_after_s=3.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.reason, copy.retryable, copy.retry_after_s) == ("said", "not_found", True, 3.0)


def test_tls_checks_the_name_of_the_address(names, tmp_path, monkeypatch):
    server, client = certificate(tmp_path, "good.test")
    asked = []
    server.sni_callback = lambda connection, name, context: asked.append(name)
    names["good.test"] = names["wrong.test"] = [["127.0.0.1"]]
    out = tmp_path / "out"
    out.mkdir()
    with site(server) as web:
        web.serve("/x", BODY)
        hosts = frozenset({f"good.test:{web.port}", f"wrong.test:{web.port}", web.host})
        allowed = replace(QUICK, allow_hosts=hosts)
        monkeypatch.setattr(module, "_tls_context", lambda: client)
        download(f"https://good.test:{web.port}/x", out / "file", allowed)
        assert (out / "file").read_bytes() == BODY and asked == ["good.test"]
        (out / "file").unlink()
        for host in ("wrong.test", "127.0.0.1"):
            message = refused(f"https://{host}:{web.port}/x", out, allowed, reason="download_failed")
            assert "certificate" in message
        monkeypatch.undo()
        there = Place("https", "good.test", web.port, "/x", (ipaddress.ip_address("127.0.0.1"),))
        monkeypatch.setattr(module, "locate", lambda url, **_: there)
        message = refused(f"https://good.test:{web.port}/x", out, allowed, reason="download_failed")
        assert "certificate" in message  # nobody vouches for it
        assert web.hits["/x"] == 1
