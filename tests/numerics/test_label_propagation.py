"""Propagation and hardening against the reference numbers and against a cell-by-cell statement of both styles."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.label_propagation import PropagationConfig, harden, propagate
from infra.errors import ConfigError, InputError

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def golden():
    with np.load(ASSETS / "label_propagation_reference.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def one_hot(labels, channels):
    return np.eye(channels, dtype=np.float32)[labels]


def plain_propagation(features, first_labels, config):
    """Both styles, one query cell at a time in float64, from the description of the protocols."""
    features = features.astype(np.float64)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    num_frames, height, width, _ = features.shape
    maps = [first_labels.astype(np.float64)]
    for t in range(1, num_frames):
        if config.style == "dino":
            contexts = [0, *range(max(1, t - config.queue), t)]
        else:
            contexts = [0, *(max(0, t - back) for back in range(config.queue, 0, -1))]
        current = np.zeros_like(maps[0])
        for i, j in np.ndindex(height, width):
            candidates = []
            for place, frame in enumerate(contexts):
                for a, b in np.ndindex(height, width):
                    if config.style == "dino":
                        inside = max(abs(i - a), abs(j - b)) <= config.radius
                    else:
                        inside = place == 0 or np.hypot(i - a, j - b) < config.radius
                    if inside:
                        candidates.append((unit[t, i, j] @ unit[frame, a, b], maps[frame][a, b]))
            candidates.sort(key=lambda pair: -pair[0])
            kept = candidates[: config.top_k]
            if config.style == "dino":
                kept = [pair for pair in candidates if pair[0] >= kept[-1][0] - 1e-12]
            weights = np.exp(np.array([pair[0] for pair in kept]) / config.temperature)
            current[i, j] = (weights[:, None] * np.stack([pair[1] for pair in kept])).sum(0) / weights.sum()
        maps.append(current)
    return np.stack(maps[1:]) if num_frames > 1 else np.zeros((0, *maps[0].shape))


def test_dino_style_equals_the_reference(golden):
    top_k, radius, queue, temperature = golden["davis_style/case0/config_topk_radius_queue_temp"]
    config = PropagationConfig(top_k=int(top_k), radius=radius, queue=int(queue), temperature=temperature)
    soft = propagate(golden["feats"], one_hot(golden["first_labels"], 3), config)
    reference = golden["davis_style/case0/soft"].transpose(0, 2, 3, 1)
    assert soft.shape == reference.shape
    assert np.abs(soft - reference).max() < 1e-5
    patch_size = int(golden["davis_style/patch_size"])
    assert np.array_equal(harden(soft, patch_size), golden["davis_style/case0/hard_upsampled"])


def test_crw_style_equals_the_reference(golden):
    queue, top_k, radius, temperature = golden["crw_style/case0/config_context_topk_radius_temp"]
    config = PropagationConfig(style="crw", top_k=int(top_k), radius=radius, queue=int(queue), temperature=temperature)
    soft = propagate(golden["feats"], one_hot(golden["first_labels"], 3), config)
    assert np.abs(soft - golden["crw_style/case0/soft"][1:]).max() < 1e-5


@pytest.mark.parametrize("style", ["dino", "crw"])
@pytest.mark.parametrize(
    ("grid", "top_k", "radius", "queue"),
    [((5, 7), 3, 1, 2), ((8, 4), 5, 2.5, 4), ((6, 6), 200, 3, 3), ((4, 9), 1, 0, 0), ((7, 3), 4, 99, 5)],
)
def test_both_styles_equal_a_cell_by_cell_statement(style, grid, top_k, radius, queue):
    generator = np.random.default_rng(top_k)
    features = generator.normal(size=(6, *grid, 8)).astype(np.float32)
    labels = generator.dirichlet(np.ones(4), size=grid).astype(np.float32)
    config = PropagationConfig(style=style, top_k=top_k, radius=radius, queue=queue, temperature=0.2)
    assert np.abs(propagate(features, labels, config) - plain_propagation(features, labels, config)).max() < 1e-5


def test_dino_style_keeps_every_tie_at_the_threshold():
    # Axis-aligned features: every cosine is exactly 0 or 1, as between the patches of a flat background.
    generator = np.random.default_rng(3)
    features = np.eye(5, dtype=np.float32)[generator.integers(0, 5, size=(6, 6, 8))] * np.float32(2.0)
    labels = one_hot(generator.integers(0, 3, size=(6, 8)), 3)
    for top_k in (1, 4, 9):
        config = PropagationConfig(top_k=top_k, radius=2, queue=4, temperature=0.1)
        assert np.abs(propagate(features, labels, config) - plain_propagation(features, labels, config)).max() < 1e-5


def test_small_tiles_change_nothing(monkeypatch):
    module = importlib.import_module("evaluation.label_propagation.propagate")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 12, 17, 16, generator=generator)
    labels = torch.eye(3)[torch.randint(0, 3, (12, 17), generator=generator)]
    for style in ("dino", "crw"):
        config = PropagationConfig(style=style, top_k=5, radius=3, queue=4)
        expected = propagate(features, labels, config)
        for chunk_bytes in (1, 40_000):
            monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
            assert torch.allclose(propagate(features, labels, config), expected, atol=1e-6)
        monkeypatch.undo()


def test_types_in_are_types_out_and_lengths_hold():
    features, labels = torch.randn(1, 3, 4, 5), torch.eye(2)[torch.zeros(3, 4, dtype=torch.long)]
    alone = propagate(features, labels, PropagationConfig())
    assert isinstance(alone, torch.Tensor)
    assert alone.shape == (0, 3, 4, 2)
    assert harden(alone, 4).shape == (0, 12, 16)
    assert isinstance(propagate(features.numpy(), labels.numpy(), PropagationConfig()), np.ndarray)
    with pytest.raises(InputError, match="do not share a grid"):
        propagate(features, labels[:2], PropagationConfig())
    with pytest.raises(ConfigError, match="Did you mean 'top_k'"):
        PropagationConfig.parse({"topk": 5})


def test_harden_stretches_each_channel_by_its_own_range():
    # Channel 1 never exceeds channel 0, yet wins where it is at its own maximum and channel 0 is not.
    soft = np.zeros((1, 1, 3, 3), dtype=np.float32)
    soft[0, 0, :, 0] = [0.9, 0.7, 0.8]
    soft[0, 0, :, 1] = [0.1, 0.3, 0.2]
    assert harden(soft, 1).tolist() == [[[0, 1, 0]]]
    # An absent object never wins; with nothing but background, background wins everywhere.
    assert harden(one_hot(np.zeros((1, 4, 4), dtype=int), 3), 2).max() == 0
