"""Peers that mean harm, or are merely broken, on both sides of the wire; each case was seen to get through once."""

from __future__ import annotations

import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve

from evaluation.rollouts.remote import RemotePolicy
from evaluation.serving.client import PolicyClient, PolicyError
from evaluation.serving.wire import WireError, pack, unpack
from infra.errors import DataError, ServiceError
from tests.helpers_serve import Counting, observation, serving
from training.protocols import Observation

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
FULL = b"\xdc\x10\x00"  # a list of 4096, as many as one may have


@pytest.mark.parametrize("message", [
    FULL + (FULL + b"\x80" * 4096) * 500,  # 2 MB that would become two million maps
    FULL + (FULL + b"\x90" * 4096) * 500,
    FULL * 900,  # lists in lists, each with room for 4096
])  # fmt: skip
def test_few_bytes_do_not_become_many_objects(message):
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(message)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("headers", [
    b"Authorization: Api-Key \xff\xfe\r\n",
    b"Authorization: Api-Key secret\r\nAuthorization: Api-Key secret\r\n",
    b"Authorization: secret\r\n",
    b"Authorization: Api-Key secre\r\n",
])  # fmt: skip
def test_any_wrong_authorization_is_answered_with_401(headers, caplog):
    with serving(Counting(), token="secret") as (url, _), dialled(url) as raw:
        raw.sendall(HANDSHAKE + headers + b"\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 401 ")
    assert "handshake failed" not in caplog.text


def test_a_page_in_a_browser_cannot_drive_the_robot():
    with serving(Counting()) as (url, _):
        with pytest.raises(InvalidStatus) as error:
            connect(url, origin="http://page.example")
        assert error.value.response.status_code == 403


def test_the_token_is_in_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    with serving(Counting(), token="canary-5f1d") as (url, _):
        with PolicyClient(url, token="canary-5f1d") as client:
            client.infer(observation())
        with pytest.raises(InvalidStatus):
            PolicyClient(url, token="canary-5f1d-not")
    assert "canary" not in caplog.text and "canary" not in repr(vars(client))


class Broken(Counting):
    """Fails on black pictures, and answers white ones with what no robot should get."""

    def act(self, observed: Observation) -> np.ndarray:
        if observed.images["main"].mean() < 1:
            raise RuntimeError("at /home/someone/weights")
        chunk = super().act(observed)
        chunk[:, -1, 0] = np.inf if observed.images["main"].mean() > 254 else 0
        return chunk


def test_a_policy_that_fails_tells_its_peer_nothing_and_hurts_nobody_else(caplog):
    with serving(Broken()) as (url, _), PolicyClient(url) as other, PolicyClient(url) as client:
        assert other.infer(observation())["actions"][0, 3] == pytest.approx(0.001)
        with pytest.raises(ConnectionClosed) as error:
            client.infer(observation(0))
        assert error.value.rcvd is not None
        assert (error.value.rcvd.code, error.value.rcvd.reason) == (1011, "")
        assert "at /home/someone/weights" in caplog.text  # whoever runs the server is told
        assert other.infer(observation())["actions"][0, 3] == pytest.approx(0.002)


def test_actions_that_are_not_finite_stay_here():
    with serving(Broken(), action_horizon=5) as (url, _), PolicyClient(url) as client:
        with pytest.raises(PolicyError, match="not finite"):
            client.infer(observation(255))
        assert np.isfinite(client.infer(observation())["actions"]).all()


def test_a_message_that_trickles_in_ends_like_silence():
    with serving(Counting(), idle_timeout_s=0.5) as (url, _), dialled(url) as raw:
        raw.sendall(HANDSHAKE + b"\r\n")
        raw.sendall(b"\x82\xfe\x03\xe8mask")  # a frame of 1000 bytes ...
        with pytest.raises(OSError):
            for _ in range(100):  # ... that come one by one
                raw.sendall(b"x")
                time.sleep(0.05)


def test_a_handshake_that_breaks_off_is_a_line_of_the_log(caplog):
    with serving(Counting()) as (url, _):
        with dialled(url) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        deadline = time.monotonic() + 5
        while "handshake failed" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "handshake failed" in caplog.text and "Traceback" not in caplog.text


def test_who_never_reads_is_hung_up_on_and_nobody_waits_for_it():
    from tests.bench.bench_serve import Talkative, deaf

    ended: list[OSError] = []

    def unheard() -> None:
        try:
            deaf(url)
        except OSError as error:
            ended.append(error)

    with serving(Talkative(), send_timeout_s=1.0) as (url, server), PolicyClient(url) as other:
        other.infer(observation())
        peer = threading.Thread(target=unheard)
        peer.start()
        answers = 0
        while peer.is_alive():
            answers += other.infer(observation())["actions"].shape == (3, 4)
        assert answers > 10  # while the server waited a second for its peer to read
        assert isinstance(ended[0], ConnectionError)  # hung up on; a timeout would be its own patience
        deadline = time.monotonic() + 5
        while server.open_connections > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.open_connections == 1


def test_who_leaves_without_a_word_frees_its_place():
    with serving(Counting(), max_connections=1) as (url, _):
        with dialled(url) as raw:
            raw.sendall(HANDSHAKE + b"\r\n")
            assert raw.recv(100)
        time.sleep(0.3)
        with PolicyClient(url) as client:
            assert client.infer(observation())["actions"].shape == (3, 4)


# --- servers that are not ours -------------------------------------------------------------------------------------
def test_a_late_answer_is_not_taken_for_the_next_one():
    def sleepy(connection) -> None:
        connection.send(msgpack.packb({}))
        for _ in connection:
            time.sleep(0.3)
            connection.send(msgpack.packb({"actions": "to the first question"}))

    with foreign(sleepy) as url:
        client = PolicyClient(url, timeout_s=0.1)
        with pytest.raises(TimeoutError):
            client.infer(observation())
        time.sleep(0.5)
        with pytest.raises(ConnectionClosed):
            client.infer(observation())
        with pytest.raises(ServiceError, match="stopped answering"):
            RemotePolicy(url, timeout_s=0.1).act(seen())


def test_a_foreign_traceback_becomes_its_last_line():
    def fails(connection) -> None:
        connection.send(msgpack.packb({}))
        connection.recv()
        connection.send("Traceback (most recent call last):\n  File \"serve.py\", line 1\nKeyError: 'wrist\x1b[2J'\n")
        connection.close(1011)

    with foreign(fails) as url, pytest.raises(DataError) as error:
        RemotePolicy(url).act(seen())
    text = str(error.value)
    assert "refused an observation: KeyError: 'wrist [2J'" in text
    assert "Traceback" not in text and "\x1b" not in text and "serve.py" not in text


def test_answers_left_over_by_a_failed_decision_are_never_carried_out():
    def picky(connection) -> None:
        connection.send(pack({}))
        for number, message in enumerate(connection, start=1):
            refuses = unpack(message)["prompt"] == "bad"
            connection.send("no" if refuses else pack({"actions": np.full((1, 4), number / 10)}))

    both = Observation({"main": np.zeros((2, 8, 8, 3), np.uint8)}, np.zeros((2, 4), np.float32), ("bad", "push"))
    with foreign(picky) as url:
        policy = RemotePolicy(url)
        with pytest.raises(DataError, match="refused an observation: no"):
            policy.act(both)
        chunk = policy.act(replace(both, text=("push", "push")))
        assert chunk[:, 0, 0].tolist() == pytest.approx([0.1, 0.1])  # first answers of new connections
        policy.close()


@pytest.mark.parametrize(("first", "words"), [
    (msgpack.packb([1]), "no map of metadata"),
    (b"\xc1", "not a msgpack message"),
    ("hello", "hello"),
])  # fmt: skip
def test_a_server_of_another_convention_is_one_line(first, words):
    def other(connection) -> None:
        connection.send(first)
        connection.recv()

    with foreign(other) as url, pytest.raises(ServiceError, match=f"no policy answers at .*{words}"):
        RemotePolicy(url)


def test_arrays_and_odd_keys_in_metadata_count_in_the_digest():
    def digest(pose: list[float]) -> str:
        packed = {b"__ndarray__": True, b"data": np.float32(pose).tobytes(), b"dtype": "<f4", b"shape": [len(pose)]}

        def told(connection) -> None:
            connection.send(msgpack.packb({"reset_pose": packed, 1: "one", "action_horizon": -3}))
            connection.recv()

        with foreign(told, port=port) as url:
            policy = RemotePolicy(url)
            assert policy.action_horizon == 1  # a horizon that makes no sense is as good as none
            return policy.digest

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert digest([0, 1]) == digest([0, 1]) != digest([0, 2])


# -------------------------------------------------------------------------------------------------------------------
def seen() -> Observation:
    return Observation({"main": np.zeros((1, 8, 8, 3), np.uint8)}, np.zeros((1, 4), np.float32), ("push",), ("a",))


@contextmanager
def dialled(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as raw:
        yield raw


@contextmanager
def foreign(handler, *, port: int = 0) -> Iterator[str]:
    server = serve(handler, "127.0.0.1", port, compression=None, max_size=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
