"""A foreign policy, served by thirty lines in openpi's convention, driven through our rollouts' `Policy`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from websockets.sync.server import Server, serve

from evaluation.rollouts.environments import MetaWorldBatch
from evaluation.rollouts.remote import RemotePolicy, is_served
from evaluation.serving import robot_loop
from infra.errors import ConfigError, DataError, ServiceError
from ingest.simulators.metaworld import prepare_rendering
from tests.helpers_serve import Counting, serving
from training.protocols import Observation

pytestmark = pytest.mark.sim


# --- a foreign server: nothing of ours in it -----------------------------------------------------------------------
def packed(value):
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(value)


def unpacked(value):
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    return value


class Foreign:
    """Reaches up by its own keys: chunks of 5 actions, a stateless policy with an empty metadata map."""

    def __init__(self, answer=None) -> None:
        self.seen: list[dict] = []
        self._answer = answer or (lambda seen: {"actions": np.tile([0.0, 0.0, 2.0, -1.0], (5, 1))})

    def __call__(self, connection) -> None:
        connection.send(msgpack.packb({}))
        for message in connection:
            self.seen.append(msgpack.unpackb(message, object_hook=unpacked))
            connection.send(msgpack.packb(self._answer(self.seen[-1]), default=packed))


# -------------------------------------------------------------------------------------------------------------------
def started(handler) -> tuple[Server, str]:
    server = serve(handler, "127.0.0.1", 0, compression=None, max_size=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


@pytest.fixture
def foreign() -> Iterator[tuple[Foreign, str]]:
    handler = Foreign()
    server, url = started(handler)
    yield handler, url
    server.shutdown()


def seen(count: int = 2) -> Observation:
    images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8)
    return Observation({"main": images}, np.zeros((count, 4), np.float32), ("push",) * count, tuple("ab"[:count]))


def test_a_foreign_policy_moves_our_simulated_arm(foreign):
    handler, url = foreign
    prepare_rendering()
    environment = MetaWorldBatch("reach", [10_000, 10_001], size=32)
    try:
        environment.reset()
        active = np.ones(2, bool)
        policy = RemotePolicy(f"{url}?image=pixels/agent&state=arm&prompt=task&horizon=3")
        policy.reset(2)
        before = environment.observe(images=True, active=active)
        chunk = policy.act(before)
        assert chunk.shape == (2, 3, 4) and chunk.dtype == np.float32
        assert chunk[0, 0].tolist() == [0, 0, 1, -1]  # clipped to what the arm takes
        for actions in np.moveaxis(chunk, 1, 0):
            environment.step(actions, active=active)
        after = environment.observe(images=False, active=active)
        assert (after.proprioception[:, 2] > before.proprioception[:, 2] + 0.005).all()
    finally:
        environment.close()
    assert set(handler.seen[0]) == {"pixels/agent", "arm", "task"}
    assert handler.seen[0]["pixels/agent"].shape == (32, 32, 3)
    assert handler.seen[0]["task"] == before.text[0]


def test_without_a_horizon_the_whole_chunk_is_carried_out_and_names_the_policy(foreign):
    _, url = foreign
    policy = RemotePolicy(url)
    policy.reset(2)
    assert policy.act(seen()).shape == (2, 5, 4)
    assert policy.action_horizon == 5
    assert policy.digest == RemotePolicy(url).digest != RemotePolicy(f"{url}?horizon=2").digest
    assert is_served(url) and not is_served("runs/policy/export")


def test_our_own_server_gives_each_environment_its_own_episode():
    with serving(Counting()) as (url, _):
        policy, local = RemotePolicy(url), Counting()
        policy.reset(2)
        local.reset(2)
        for _ in range(3):
            np.testing.assert_allclose(policy.act(seen()), local.act(seen())[:, :3], atol=1e-6)
        policy.reset(2)
        assert policy.act(seen())[0, 0, 3] == pytest.approx(0.001)
        assert policy.timings["server"] > 0
        policy.close()


def test_our_own_server_tells_its_cameras():
    class TwoEyes(Counting):
        cameras = ("main", "wrist")

        def act(self, observed):
            chunk = super().act(observed)
            chunk[..., 1] = observed.images["wrist"].mean() / 255
            return chunk

    wrist = np.full((1, 8, 8, 3), 51, np.uint8)
    with serving(TwoEyes()) as (url, _):
        policy = RemotePolicy(url)
        assert (policy.cameras, policy.needs_images, policy.action_horizon) == (("main", "wrist"), True, 3)
        policy.reset(1)
        with pytest.raises(DataError, match="needs camera wrist"):
            policy.act(seen(1))
        both = replace(seen(1), images=seen(1).images | {"wrist": wrist})
        assert policy.act(both)[0, 0, 1] == pytest.approx(0.2)
        policy.close()


def test_a_policy_without_eyes_is_sent_no_picture():
    class Blind(Counting):
        needs_images = False

        def act(self, observed):
            assert not observed.images
            return np.repeat(observed.proprioception[:, None], 3, axis=1)

    with serving(Blind()) as (url, _):
        policy = RemotePolicy(url)
        assert not policy.needs_images
        policy.reset(1)
        assert policy.act(replace(seen(1), images={})).shape == (1, 3, 4)
        policy.close()


def test_the_example_robot_loop_drives_the_simulator(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("FOREFRAME_POLICY_TOKEN", "t")
    with serving(Counting(), token="t") as (url, _):
        assert robot_loop.main([url, "--task", "reach", "--steps", "12", "--rate", "1000"]) == 0
    assert "not solved after 12 steps" in caplog.text


@pytest.mark.parametrize(("answer", "words"), [
    ({"action": np.zeros((2, 4))}, "answers 'actions' with NoneType"),
    ({"actions": [0.0]}, "answers 'actions' with list"),
    ({"actions": np.zeros((2, 2, 4))}, r"float64 \(2, 2, 4\)"),
    ({"actions": np.full((2, 4), np.nan)}, "not finite"),
    ({"actions": np.zeros((0, 4))}, "empty"),
])  # fmt: skip
def test_answers_that_are_no_chunk_are_named(answer, words):
    server, url = started(Foreign(lambda _: answer))
    try:
        with pytest.raises(DataError, match=words):
            RemotePolicy(url).act(seen(1))
    finally:
        server.shutdown()


def test_a_refusal_is_passed_on_as_one_line():
    with (
        serving(Counting()) as (url, _),
        pytest.raises(DataError, match="refused an observation: error: 'observation/image"),
    ):
        RemotePolicy(f"{url}?image=picture").act(seen(1))


def test_nobody_there_and_wrong_addresses_are_one_line():
    with pytest.raises(ServiceError, match=r"no policy answers at ws://127\.0\.0\.1:9"):
        RemotePolicy("ws://127.0.0.1:9")
    with pytest.raises(ConfigError, match="unknown key 'picture'"):
        RemotePolicy("ws://127.0.0.1:9?picture=x")
    with pytest.raises(ConfigError, match="horizon=0"):
        RemotePolicy("ws://127.0.0.1:9?horizon=0")


def test_a_server_that_refuses_says_what_to_set(monkeypatch):
    monkeypatch.delenv("FOREFRAME_POLICY_TOKEN", raising=False)
    refused, crowded = r"HTTP 401.*Set FOREFRAME_POLICY_TOKEN", r"HTTP 503.*lower batch_size"
    with serving(Counting(), token="t") as (url, _), pytest.raises(ServiceError, match=refused):
        RemotePolicy(url)
    with serving(Counting(), max_connections=2) as (url, _), pytest.raises(ServiceError, match=crowded):
        RemotePolicy(url).reset(3)


def test_two_checkpoints_at_one_address_can_be_told_apart(foreign):
    _, url = foreign
    digests = {RemotePolicy(f"{url}?name={name}").digest for name in ("step-1000", "step-2000")}
    assert len(digests) == 2


@pytest.mark.parametrize("timing", [None, "soon", {"infer_ms": None}, {"infer_ms": "abc"}, {"infer_ms": float("nan")}])
def test_timings_of_no_use_cost_nothing(timing):
    server, url = started(Foreign(lambda _: {"actions": np.zeros((2, 4)), "server_timing": timing}))
    try:
        policy = RemotePolicy(url)
        policy.act(seen(1))
        assert policy.timings == {"server": 0.0}
    finally:
        server.shutdown()


def test_a_server_that_dies_is_one_line():
    def once(connection) -> None:
        connection.send(msgpack.packb({}))
        connection.recv()

    server, url = started(once)
    with pytest.raises(ServiceError, match="stopped answering"):
        RemotePolicy(url).act(seen(1))
    server.shutdown()
