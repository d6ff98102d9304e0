"""What the video model relies on in diffusers; an upgrade that changes it fails here first."""

from __future__ import annotations

import pytest
import torch

from tests.helpers_tvp import TINY, randoms, tiny_model, untouched_unet
from training.models.tvp import TextGuidedVideoModel, TVPConfig
from training.models.tvp.features import up_block_outputs


def inputs_of(clips: int, frames: int, height: int, width: int):
    normal = randoms(11)
    ids = torch.tensor([[7.0, 127.0, 0.1]]).repeat(clips, 1)
    return normal(clips, frames, 8, height, width), normal(clips, 5, 768), ids


@pytest.mark.parametrize(("height", "width"), [(8, 8), (10, 6), (7, 9)])
def test_our_walk_gives_what_the_forward_pass_gives_at_every_up_block(height: int, width: int) -> None:
    """Compared at the blocks' own outputs, also for sizes that halving rounds."""
    unet = tiny_model().unet
    latents, tokens, ids = inputs_of(2, 4, height, width)
    time = torch.tensor([0.3, 1.6])
    theirs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: theirs.append(output)) for block in unet.up_blocks]
    with torch.no_grad():
        unet(latents, time, tokens, ids)
        for hook in hooks:
            hook.remove()
        own = up_block_outputs(unet, latents, tokens, ids, time_B=time, last=2)
    assert len(own) == len(theirs) == 3
    for walked, called in zip(own, theirs, strict=True):
        assert torch.equal(walked.flatten(0, 1), called)


def test_our_walk_stops_after_the_last_block_asked_for() -> None:
    unet = tiny_model().unet
    ran: list[int] = []
    for number, block in enumerate(unet.up_blocks):
        block.register_forward_hook(lambda _m, _i, _o, number=number: ran.append(number))
    unet.conv_out.register_forward_hook(lambda *_: ran.append(-1))
    latents, tokens, ids = inputs_of(1, 4, 8, 8)
    with torch.no_grad():
        outputs = up_block_outputs(unet, latents, tokens, ids, time_B=torch.ones(1), last=1)
    assert len(outputs) == 2
    assert ran == [0, 1]


def test_every_clip_attends_to_its_own_text() -> None:
    """An earlier diffusers mixed the clips' texts up in temporal attention when a batch held more than one."""
    unet = tiny_model().unet
    latents, tokens, ids = inputs_of(2, 4, 8, 8)
    time = torch.ones(2)
    with torch.no_grad():
        together = unet(latents, time, tokens, ids).sample
        alone = [unet(latents[i : i + 1], time[:1], tokens[i : i + 1], ids[:1]).sample for i in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_one_text_per_clip_changes_no_answer_and_reads_it_once() -> None:
    model = tiny_model()
    plain = untouched_unet(model)
    latents, tokens, ids = inputs_of(2, 4, 8, 8)
    rows: dict[str, list[int]] = {"own": [], "plain": []}
    for name, unet in (("own", model.unet), ("plain", plain)):
        keys = unet.down_blocks[0].attentions[0].temporal_transformer_blocks[0].attn2.to_k
        keys.register_forward_pre_hook(lambda _m, inputs, name=name: rows[name].append(len(inputs[0])))
    with torch.no_grad():
        own, theirs = (unet(latents, torch.ones(2), tokens, ids).sample for unet in (model.unet, plain))
    assert torch.allclose(own, theirs, atol=1e-5)
    assert rows == {"own": [2], "plain": [2 * 8 * 8]}


def test_networks_have_no_buffers_so_weights_are_all_there_is() -> None:
    """Loading fills weights of modules built without memory; a buffer would stay empty."""
    assert list(tiny_model().named_buffers()) == []


def test_nothing_in_the_networks_is_random_in_training_mode() -> None:
    model = tiny_model().train()
    latents, tokens, ids = inputs_of(1, 4, 8, 8)
    with torch.no_grad():
        first, second = (model.unet(latents, torch.ones(1), tokens, ids).sample for _ in range(2))
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def full_size() -> TextGuidedVideoModel:
    with torch.device("meta"):
        return TextGuidedVideoModel.random(TVPConfig())


def test_full_size_has_the_releases_keys_and_shapes(full_size: TextGuidedVideoModel) -> None:
    unet = {name: tuple(value.shape) for name, value in full_size.unet.state_dict().items()}
    assert sum(weight.numel() for weight in full_size.unet.parameters()) == 1_524_623_082
    assert unet["conv_in.weight"] == (320, 8, 3, 3)
    assert unet["conv_out.weight"] == (4, 320, 3, 3)
    assert unet["time_embedding.linear_1.weight"] == (1280, 320)
    assert unet["add_embedding.linear_1.weight"] == (1280, 768)
    widths = {320, 640, 1280}
    keys = [name for name in unet if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    # Two attentions a level going down, three going up, one in the middle; spatial and temporal; keys and values.
    assert len(keys) == (3 * 2 + 3 * 3 + 1) * 2 * 2
    assert all(unet[name][1] == 1024 and unet[name][0] in widths for name in keys)
    assert not any(name.startswith(("down_blocks.3.attentions", "up_blocks.0.attentions")) for name in unet)
    assert unet["mid_block.attentions.0.temporal_transformer_blocks.0.attn2.to_q.weight"] == (1280, 1280)
    heads = [full_size.unet.down_blocks[i].attentions[0].transformer_blocks[0].attn1.heads for i in range(3)]
    assert heads == [5, 10, 20]


def test_full_size_autoencoder_has_four_channels_and_shrinks_eight_times(full_size: TextGuidedVideoModel) -> None:
    vae = {name: tuple(value.shape) for name, value in full_size.vae.state_dict().items()}
    assert vae["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert vae["quant_conv.weight"] == (8, 8, 1, 1)
    assert vae["decoder.conv_in.weight"] == (512, 4, 3, 3)
    assert vae["decoder.time_conv_out.weight"] == (3, 3, 3, 1, 1)
    assert full_size.scale == 0.18215
    assert TVPConfig().vae.downscale == 8


def test_full_size_computes_without_memory(full_size: TextGuidedVideoModel) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    tokens = empty(1, 20, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_size.training_loss(empty(1, 16, 4, 32, 32), tokens)
    assert loss.dtype == torch.float32
    assert full_size.extract_features(empty(1, 3, 256, 256), tokens).shape == (1, 16, 2560, 16, 16)
    assert full_size.extract_features(empty(1, 1, 4, 32, 32), tokens, layers=(0, 1, 2)).shape == (1, 16, 3200, 32, 32)


def test_tiny_differs_from_full_size_only_in_sizes(full_size: TextGuidedVideoModel) -> None:
    small = tiny_model(TINY)
    for part in ("unet", "vae"):
        own, full = (dict(getattr(model, part).config) for model in (small, full_size))
        assert type(getattr(small, part)) is type(getattr(full_size, part))
        assert own.keys() == full.keys()
