"""The behaviour-cloning head and its closed loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, InputError
from tests.helpers_data import make_episode_dataset
from tests.helpers_models import CONFIG
from training.data.episodes import ActionWindows, load_episodes
from training.export import random_encoder
from training.features import compute_features
from training.models.common.text import SentenceEncoder
from training.models.policies import BehaviourCloningConfig, BehaviourCloningHead, BehaviourCloningPolicy, Moments
from training.protocols import Observation


def build(**changes) -> BehaviourCloningHead:
    torch.manual_seed(0)
    defaults = {"feature_dim": 48, "text_dim": 0, "hidden": (32,)}
    return BehaviourCloningHead(BehaviourCloningConfig(**(defaults | changes)))


CORTEXBENCH = {
    "history": 3, "fusion": "flare", "batch_norm": True, "standardise": False, "hidden": (256, 256, 256),
    "chunk": 1, "execute": 1, "loss": "mse",
}  # fmt: skip


def test_cortexbench_head_is_a_batch_norm_and_three_hidden_layers() -> None:
    head = build(**CORTEXBENCH)
    shapes = [tuple(value.shape) for name, value in head.named_parameters() if name.endswith("weight")]
    assert shapes == [(148,), (256, 148), (256, 256), (256, 256), (4, 256)]
    seen = []
    head.perceptron.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.randn(2, 3, 48)
    head(frames, torch.zeros(2, 4), None)
    a, b, c = frames.unbind(1)
    assert torch.equal(seen[0][:, :144], torch.cat([b - a, c - b, c], dim=1))


def test_loss_is_the_mean_over_existing_actions_in_standardised_units() -> None:
    head = build(feature="none", feature_dim=0, chunk=3, execute=1, action_dim=2, loss="mse")
    head.set_statistics(actions=Moments(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])))
    proprioception, actions = torch.randn(2, 4), torch.randn(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    predicted = head(None, proprioception, None).detach().numpy()
    target = (actions.numpy() - [1.0, -1.0]) / [0.5, 2.0]
    squares = ((predicted - target) ** 2)[mask.numpy()]
    assert head.loss(None, proprioception, None, actions, mask).item() == pytest.approx(squares.mean(), rel=1e-5)
    decoded = head.predict(None, proprioception, None).numpy()
    assert np.allclose(decoded, np.clip(predicted * [0.5, 2.0] + [1.0, -1.0], -1, 1), atol=1e-6)


def test_a_constant_channel_does_not_blow_up() -> None:
    moments = Moments.of(np.array([[1.0, 5.0], [3.0, 5.0]], np.float32))
    assert moments.mean.tolist() == [2.0, 5.0] and moments.std.tolist() == [1.0, 1.0]


def test_spatial_softmax_says_where_the_map_is_high() -> None:
    head = build(feature="patch_tokens", feature_dim=1, num_tokens=16, reduction="spatial_softmax", token_dim=1)
    torch.nn.init.constant_(head.project.weight, 50.0)
    torch.nn.init.zeros_(head.project.bias)
    tokens = torch.zeros(1, 1, 16, 1)
    tokens[0, 0, 4 * 1 + 3] = 1.0  # row 1, column 3
    seen = []
    head.perceptron.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head(tokens, torch.zeros(1, 4), None)
    assert seen[0][0, :2].tolist() == pytest.approx([1.0, -1 / 3], abs=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"feature": "patch_tokens", "num_tokens": 16}, CORTEXBENCH,
    {"feature": "patch_tokens", "num_tokens": 16, "reduction": "spatial_softmax", "history": 2, "fusion": "flare"},
])  # fmt: skip
def test_every_variant_learns_a_rule_of_its_features(changes: dict) -> None:
    head = build(**changes)
    config = head.config
    shape = (64, config.history, *([16] if config.feature == "patch_tokens" else []), 48)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    latest = features[:, -1].mean(dim=1) if config.feature == "patch_tokens" else features[:, -1]
    actions = latest[:, None, :4].expand(-1, config.chunk, -1).tanh()
    head.set_statistics(features=Moments.of(features), actions=Moments.of(actions))
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = head.loss(features, torch.zeros(64, 4), None, actions)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"execute": 9}, "execute 9 exceeds chunk 8"),
    ({"feature": "none"}, "does not go with feature_dim 48"),
    ({"feature": "patch_tokens", "num_tokens": 15}, "num_tokens 15 is not the size of a square"),
    ({"history": 2}, "ignores all but one"),
    ({"feature": "none", "feature_dim": 0, "proprioception_dim": 0}, "sees nothing"),
])  # fmt: skip
def test_heads_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BehaviourCloningConfig.parse({"feature_dim": 48, "text_dim": 0} | changes)


def test_closed_loop_sees_the_features_it_was_trained_on(tmp_path) -> None:
    from ingest.reader import ShardDataset

    dataset = ShardDataset(make_episode_dataset(tmp_path, num_episodes=2, num_frames=9, size=32))
    episodes = load_episodes(dataset)
    encoder = random_encoder(CONFIG, seed=3)
    progress = []
    features = compute_features(
        dataset, episodes, encoder, kind="class_token", batch_size=4, progress=lambda *counts: progress.append(counts)
    )
    assert progress[-1] == (18, 18) and [part.shape for part in features.per_episode()] == [(9, 48)] * 2

    head = build(history=3, fusion="flare", chunk=4, execute=2)
    assert head.config.history_offsets == (-4, -2, 0)
    head.set_statistics(features=Moments.of(features.rows))
    windows = ActionWindows(episodes, chunk=4)
    numbers = [number for number in range(len(windows)) if number >= windows.num_actions[0]]  # the second episode
    trained_on = windows.batch(numbers)
    expected = head.eval().predict(
        features.windows(trained_on, head.config.history_offsets), trained_on.proprioception, None
    )

    policy = BehaviourCloningPolicy(head, encoder=encoder, camera="corner4")
    policy.reset(1)
    for frame in range(0, 8, head.config.execute):
        picture = dataset.frames(1, [frame])
        state = episodes[1].proprioception[frame : frame + 1]
        actions = policy.act(Observation({"corner4": picture}, state, ("",)))
        assert np.allclose(actions, expected[frame : frame + 1, :2].numpy(), atol=1e-5), frame


def test_reset_forgets_and_a_missing_camera_is_named() -> None:
    head = build(history=2, fusion="flare", chunk=2, execute=1)
    policy = BehaviourCloningPolicy(head, encoder=random_encoder(CONFIG, seed=3), camera="corner4")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)

    def act(index: int) -> np.ndarray:
        return policy.act(Observation({"corner4": pictures[index]}, np.zeros((2, 4), np.float32), ("", "")))

    first, second = act(0), act(1)
    policy.reset(2)
    assert not np.array_equal(second, act(1))
    policy.reset(2)
    assert np.array_equal(first, act(0)) and np.array_equal(second, act(1))
    with pytest.raises(InputError, match=r"needs camera 'corner4', the observation has \['main'\]"):
        policy.act(Observation({"main": pictures[0]}, np.zeros((2, 4), np.float32), ("", "")))


def test_sentence_vectors_are_unit_length_meaningful_and_independent_of_the_batch() -> None:
    encoder = SentenceEncoder()
    sentences = ["open the drawer", "pull the drawer open", "press the red button from above on the machine"]
    vectors = encoder.encode(sentences)
    assert vectors.shape == (3, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.8
    assert vectors[0] @ vectors[2] < 0.5
    assert torch.equal(SentenceEncoder().encode(sentences[1:2])[0], vectors[1])
