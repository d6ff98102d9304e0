"""A served policy: good clients get their answers, in order, beside slow and hostile ones."""

from __future__ import annotations

import resource
import socket
import threading
import time
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from evaluation.serve import PolicyServer, ServeConfig
from evaluation.serving.client import PolicyClient, PolicyError
from evaluation.serving.wire import pack, unpack
from infra.errors import ConfigError
from tests.helpers_serve import Counting, observation, serving


@pytest.fixture
def address():
    with serving(Counting()) as (url, _):
        yield url


def test_metadata_comes_first_then_each_observation_has_its_chunk(address):
    with PolicyClient(address) as client:
        assert client.metadata["policy"] == "counting"
        assert (client.metadata["cameras"], client.metadata["action_horizon"]) == (["main"], 3)
        answer = client.infer(observation(51, state=0.5, prompt="x" * 20))
        assert answer["actions"].shape == (3, 4) and answer["actions"].dtype == np.float32
        assert answer["actions"][0].tolist() == pytest.approx([0.2, 0.5, 0.2, 0.001], abs=1e-6)
        assert set(answer["server_timing"]) == {"infer_ms", "queue_ms"}
        assert "prev_total_ms" in client.infer(observation())["server_timing"]


def test_every_connection_has_its_own_episode(address):
    with PolicyClient(address) as one, PolicyClient(address) as other:
        decisions = [one.infer(observation())["actions"][0, 3] for _ in range(3)]
        assert decisions == pytest.approx([0.001, 0.002, 0.003])
        assert other.infer(observation())["actions"][0, 3] == pytest.approx(0.001)
        one.reset()
        assert one.infer(observation())["actions"][0, 3] == pytest.approx(0.001)


@pytest.mark.parametrize(("change", "words"), [
    ({"observation/image": np.zeros((4, 4, 3), np.float32)}, "must be uint8 (height, width, 3), not float32 (4, 4, 3)"),
    ({"observation/image": np.zeros((4, 4), np.uint8)}, "not uint8 (4, 4)"),
    ({"observation/image": np.zeros((5000, 1, 3), np.uint8)}, "sides of 1 to 4096"),
    ({"observation/image": None}, "it is missing"),
    ({"observation/state": np.array([np.nan], np.float32)}, "finite numbers"),
    ({"observation/state": np.zeros((2, 2), np.float32)}, "finite numbers"),
    ({"observation/state": "high"}, "finite numbers"),
    ({"prompt": ""}, "'prompt' must be a sentence"),
    ({"prompt": 5}, "'prompt' must be a sentence"),
    ({"episode": 5}, "'episode' a name"),
])  # fmt: skip
def test_a_wrong_observation_is_answered_with_one_line_and_the_next_one_counts(address, change, words):
    with PolicyClient(address) as client:
        with pytest.raises(PolicyError) as error:
            client.infer(observation() | change)
        assert words in str(error.value)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
        assert client.infer(observation())["actions"].shape == (3, 4)


def test_too_many_wrong_observations_end_the_connection():
    with serving(Counting(), max_errors=3) as (url, _), PolicyClient(url) as client:
        for _ in range(3):
            with pytest.raises(PolicyError):
                client.infer({})
        with pytest.raises(ConnectionClosed):
            client.infer(observation())


@pytest.mark.parametrize("message", [b"\xc1", b"\x91" * 50_000, "text", msgpack.packb({b"__ndarray__": True})])
def test_what_is_no_message_ends_the_connection_with_one_line(address, message):
    with connect(address, compression=None) as connection:
        connection.recv()
        connection.send(message)
        line = connection.recv(timeout=5)
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=5)


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    with serving(Counting(), max_message_bytes=10_000) as (url, _), PolicyClient(url) as client:
        with pytest.raises(ConnectionClosed) as error:
            client.infer(observation(size=200))
        assert error.value.rcvd is not None and error.value.rcvd.code == 1009


def test_health_needs_no_token_and_no_websocket():
    with (
        serving(Counting(), token="secret") as (url, _),
        urllib.request.urlopen(url.replace("ws", "http") + "/healthz", timeout=5) as answer,
    ):
        assert (answer.status, answer.read()) == (200, b"OK\n")


def test_a_token_is_asked_for_where_there_is_one():
    with serving(Counting(), token="secret") as (url, _):
        for token in ("", "wrong"):
            with pytest.raises(InvalidStatus) as error:
                PolicyClient(url, token=token)
            assert error.value.response.status_code == 401
        with PolicyClient(url, token="secret") as client:
            assert client.infer(observation())["actions"].shape == (3, 4)


def test_other_hosts_need_a_token():
    with pytest.raises(ConfigError, match="FOREFRAME_SERVE_TOKEN"):
        PolicyServer(Counting(), ServeConfig(model="m", host="0.0.0.0"))


def test_connections_are_counted_and_the_one_too_many_is_told():
    with serving(Counting(), max_connections=1) as (url, _):
        with PolicyClient(url):
            with pytest.raises(InvalidStatus) as error:
                PolicyClient(url)
            assert error.value.response.status_code == 503
        time.sleep(0.2)
        PolicyClient(url).close()


def test_silence_ends_a_connection():
    with serving(Counting(), idle_timeout_s=0.3) as (url, _), PolicyClient(url) as client:
        client.infer(observation())
        with pytest.raises(ConnectionClosed):
            client.receive()


def test_good_clients_lose_nothing_beside_slow_and_hostile_ones():
    """Four seconds of what `tests/bench/bench_serve.py` does for five minutes."""
    from tests.bench.bench_serve import LIMITS, OTHERS, Talkative, load

    with serving(Talkative(), **LIMITS) as (url, server):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = load(url, seconds=4.0, good=3)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert server.answered >= outcome.answered
        deadline = time.monotonic() + 10
        while server.open_connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.open_connections == 0  # the deaf one was hung up on
    assert outcome.asked == outcome.answered > 100
    assert outcome.wrong == 0
    assert set(outcome.others) == {kind.__name__ for kind in OTHERS}
    assert grown < 200_000  # kB


def test_half_open_connections_do_not_hold_places():
    with serving(Counting(), max_connections=2) as (url, _):
        port = int(url.rpartition(":")[2])
        dangling = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]  # never say a word
        with PolicyClient(url) as client:
            assert client.infer(observation())["actions"].shape == (3, 4)
        for item in dangling:
            item.close()


def test_the_robot_loop_asks_in_time_and_drops_what_is_too_old():
    from evaluation.serving.robot_loop import control

    class Slow(Counting):
        def act(self, observed):
            time.sleep(0.05)
            return super().act(observed)

    class Robot:
        def __init__(self) -> None:
            self.actions: list[float] = []

        def observe(self):
            return observation()

        def act(self, action) -> bool:
            self.actions.append(round(float(action[3]), 4))
            return len(self.actions) == 30

    with serving(Slow()) as (url, _), PolicyClient(url) as client:
        robot = Robot()
        stats = control(robot, client, rate_hz=100, max_steps=40)
        assert stats.done and stats.steps == 30
        assert stats.held > 0 and stats.dropped > 0  # 50 ms a decision for 30 ms of actions
        assert robot.actions == sorted(robot.actions)
        patient = Robot()
        waiting = control(patient, client, rate_hz=1000, max_steps=40, ahead=0)
        assert (waiting.held, waiting.dropped) == (0, 0)
        assert patient.actions == [round(0.001 * (1 + step // 3), 4) for step in range(30)]


def test_a_robot_is_not_hurried_after_a_wait():
    from evaluation.serving.robot_loop import control

    class Stalls(Counting):
        def act(self, observed):
            time.sleep(0.5 if self._decision == 1 else 0.0)
            return super().act(observed)

    class Robot:
        def __init__(self) -> None:
            self.times: list[float] = []

        def observe(self):
            return observation()

        def act(self, action) -> bool:
            self.times.append(time.perf_counter())
            return len(self.times) == 12

    with serving(Stalls()) as (url, _), PolicyClient(url) as client:
        robot = Robot()
        control(robot, client, rate_hz=20, max_steps=40, ahead=0)
    gaps = np.diff(robot.times)
    assert gaps.max() > 0.4  # it waited
    after = gaps[gaps.argmax() + 1 :]
    assert after.sum() > 0.5 * 0.05 * len(after)  # and went on at its pace, not all missed steps at once


def test_a_served_export_runs_as_a_command(tmp_path):
    import os
    import re
    import signal
    import subprocess
    import sys

    from training.export import model_card, save_export
    from training.models.policies import BehaviourCloningConfig, BehaviourCloningHead, BehaviourCloningPolicy

    policy = BehaviourCloningPolicy(BehaviourCloningHead(BehaviourCloningConfig(feature="none", hidden=(8,))))
    save_export(
        tmp_path / "export", kind="bc-policy", model_config=policy.config, weights=policy.weights(),
        preprocessing=policy.preprocessing, card=model_card("T", summary="s", facts={}, limits="l"), inputs=["d"],
    )  # fmt: skip
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(tmp_path / "export"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=os.environ)
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "serving" in line)
        url = re.search(r"ws://[\d.:]+", said)
        assert url is not None
        with PolicyClient(url.group(0)) as client:
            assert client.metadata["state_dim"] == 4
            answer = client.infer({"observation/state": np.zeros(4, np.float32), "prompt": "open the drawer"})
            assert answer["actions"].shape == (4, 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        killer.cancel()
        process.kill()


def test_answers_are_what_openpis_client_unpacks(address):
    """By hand, as its client does it: `object_hook` over the reserved byte keys."""

    def hook(value):
        if b"__ndarray__" in value:
            return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
        return value

    with connect(address, compression=None, max_size=None) as connection:
        assert msgpack.unpackb(connection.recv(), object_hook=hook)["server"] == "foreframe"
        connection.send(pack(observation()))
        answer = msgpack.unpackb(connection.recv(), object_hook=hook)
        assert answer["actions"].shape == (3, 4)
        assert unpack(pack(answer))["actions"].shape == (3, 4)
