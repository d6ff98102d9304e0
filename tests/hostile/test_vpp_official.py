"""Released policy files from strangers: sizes and names by the published table, nothing in them runs."""

from __future__ import annotations

import base64
import io
import os
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from infra.errors import InputError
from training.models.common.weights import PassedOver, read_checkpoint
from training.models.vpp.config import ActionDenoiserConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.official import read_release, release_weights

FORMER = VideoFormerConfig(condition_dim=24, dim=32, depth=2, num_frames=4, num_latents=3, num_heads=4, head_dim=8)
DENOISER = ActionDenoiserConfig(
    token_dim=32, num_tokens=12, goal_dim=16, dim=32, encoder_layers=2, decoder_layers=2, num_heads=4
)
# pickle.dumps(OmegaConf.create({"lr": 1e-4, "views": ["static", "gripper"], "nested": {"flag": True, "none": None}}),
# protocol=2), written by omegaconf 2.3.0
OMEGACONF = zlib.decompress(
    base64.b64decode(
        "eNplk9tT00AUxsu1ZUFARRDEaxGDSr3jXcCiiECVeNsXJ5Ok255oSHqSDQ4PO6MPzpR/01f/Cc+mjabjTGd6dpPz+779zuZ7vxvui6bthkGj"
        "UvdcqQuvyTaorHZKLCz9wD6F/QYfKRQK1r6Qdt2WNg7kWh07FowapO0FItrtvsJwkHqHFA4bvES9kWhY8rAlsOjSnxc02XpwyLDER+lh6HwR"
        "ruw8H3Ety0k8X3qBZTHtiyFLEWFLemFg+zja5gO0/ioOcazGh6hs+HYzxmMKxznLllYUhhInjvh4Kh+H/oGILNd2QeCk64a+T5oEjFldNOzE"
        "lx2t48B+4gkTT6aapNGxNQUlPkYbwhf7Iuh6PQWlxOFFHU3Ljmgbp2tpm0XJSL2eUXja4P205Uc4m0stCOsi1hnUqGA4R2GdUThvwH/R/kv0"
        "LL10TuF5A4pQgpEajLZhDGaBzn0BJo5gElLzF028lDgwDX18UHs5oMjKm6tzK79+z1eXybBO7MAT32JcyIn5XpxdgR0qsytwmUQXFV4hZ6BH"
        "aihc6hromZRuZ3i142lBe7qW83TdxGWY6m0I6RJgBdIQtVuY+Yw3DNBR3FR4SwvqE99WeKfnxNsFTb+bo98zcSVlLEKZD9PpYmlLz8X7tKlx"
        "DxQ+zHCPFD7uxfVp3JMc7qmJz/7i9HSbkddqiQhXE0dQflohELEUdVwD/YmsK3ye5VNVuNHlA+uksaYFXuQEXpq4CXSj8mdX+MpI56UvL26l"
        "vl8r3M587yjc7R38lsbWctg3Jr5NcetQbpNPTQvCQOBeSjMVvsto7xV+6KXtadrHHO2TiTyj1RInSX+VP5mPTMM="
    )
)
SETTINGS = OMEGACONF[2:-1]  # without the protocol and the stop
PLACE = b"X\x05\x00\x00\x00PLACE"  # the pickle opcode of that string


def small_release() -> tuple[VideoFormer, ActionDenoiser, dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        former, denoiser = VideoFormer(FORMER), ActionDenoiser(DENOISER)
    return former, denoiser, release_weights(former, denoiser)


def published_table() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the two modules of a released CALVIN policy, by hand."""
    table: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inputs: int, *, bias: bool = True) -> None:
        table[f"{name}.weight"] = (out, inputs)
        if bias:
            table[f"{name}.bias"] = (out,)

    def scale(name: str, *, bias: bool) -> None:
        table[f"{name}.weight"] = (384,)
        if bias:
            table[f"{name}.bias"] = (384,)

    table |= {"Video_Former.latents": (16, 14, 384), "Video_Former.time_pos_emb": (16, 1, 384)}
    linear("Video_Former.goal_emb.0", 768, 2560)
    linear("Video_Former.goal_emb.2", 384, 768)
    scale("Video_Former.norm", bias=True)
    for layer in (f"Video_Former.layers.{n}" for n in range(6)):
        for name in ("norm_media", "norm_latents"):
            scale(f"{layer}.0.{name}", bias=True)
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{layer}.0.{name}", 512, 384, bias=False)
        linear(f"{layer}.0.to_out", 384, 512, bias=False)
        linear(f"{layer}.1.qkv", 1152, 384)
        linear(f"{layer}.1.proj", 384, 384)
        scale(f"{layer}.2.0", bias=True)
        linear(f"{layer}.2.1", 1536, 384, bias=False)
        linear(f"{layer}.2.3", 384, 1536, bias=False)

    inner = "model.inner_model"
    table[f"{inner}.pos_emb"] = (1, 235, 384)
    linear(f"{inner}.tok_emb", 384, 384)
    linear(f"{inner}.action_emb", 384, 7)
    linear(f"{inner}.action_pred", 7, 384)
    for name, first, second, width in (
        ("lang_emb", 0, 2, 512), ("goal_emb", 0, 2, 512), ("proprio_emb", 0, 2, 8), ("sigma_emb", 1, 3, 384),
    ):  # fmt: skip
        linear(f"{inner}.{name}.{first}", 768, width)
        linear(f"{inner}.{name}.{second}", 384, 768)
    for side in ("encoder", "decoder"):
        scale(f"{inner}.{side}.ln", bias=False)
        for block in (f"{inner}.{side}.blocks.{n}" for n in range(4)):
            scale(f"{block}.ln_1", bias=False)
            scale(f"{block}.ln_2", bias=False)
            for attention in ("attn", "cross_att") if side == "decoder" else ("attn",):
                for name in ("key", "query", "value"):
                    linear(f"{block}.{attention}.{name}", 384, 384)
                linear(f"{block}.{attention}.c_proj", 384, 384, bias=False)
            linear(f"{block}.mlp.c_fc", 1536, 384, bias=False)
            linear(f"{block}.mlp.c_proj", 384, 1536, bias=False)
            if side == "decoder":
                scale(f"{block}.ln3", bias=True)
                linear(f"{block}.adaLN_zero.modulation.1", 2304, 384)
    return table


def test_full_size_has_the_published_names_shapes_and_counts() -> None:
    with torch.device("meta"):
        former, denoiser = VideoFormer(VideoFormerConfig()), ActionDenoiser(ActionDenoiserConfig())
    weights = release_weights(former, denoiser)
    assert {name: tuple(value.shape) for name, value in weights.items()} == published_table()
    assert len(weights) == 261
    assert sum(weight.numel() for weight in former.parameters()) == 17_713_536
    assert sum(weight.numel() for weight in denoiser.parameters()) == 22_602_631


def test_full_size_release_is_read_without_a_config(tmp_path: Path) -> None:
    """With a CLIP copy beside it, OmegaConf arguments, and another policy's proprioception."""
    state = {name: torch.zeros(1).expand(shape) for name, shape in published_table().items()}
    state |= {"language_goal.clip_rn50.positional_embedding": torch.zeros(77, 512)}
    write(tmp_path / "dp-calvin.pt", state, SETTINGS)
    release = read_release(tmp_path / "dp-calvin.pt")
    assert release.former_config == VideoFormerConfig()
    assert release.denoiser_config == ActionDenoiserConfig()
    assert len(release.former) + len(release.denoiser) == 261
    assert "omegaconf" not in sys.modules
    with_state = read_release(tmp_path / "dp-calvin.pt", proprioception=True)
    assert with_state.denoiser_config.proprioception_dim == 8
    # A bimanual robot's: 8 actions of 38, one view's 1280 channels, other widths of state.
    changed = {
        "model.inner_model.pos_emb": (1, 233, 384), "model.inner_model.action_emb.weight": (384, 38),
        "model.inner_model.action_pred.weight": (38, 384), "model.inner_model.action_pred.bias": (38,),
        "model.inner_model.proprio_emb.0.weight": (768, 38), "Video_Former.goal_emb.0.weight": (768, 1280),
    }  # fmt: skip
    state |= {name: torch.zeros(1).expand(shape) for name, shape in changed.items()}
    write(tmp_path / "xbot.pt", state, SETTINGS)
    release = read_release(tmp_path / "xbot.pt", proprioception=True)
    assert release.former_config == VideoFormerConfig(condition_dim=1280)
    assert release.denoiser_config == ActionDenoiserConfig(action_dim=38, chunk=8, proprioception_dim=38)
    with torch.device("meta"):
        assert VideoFormer(release.former_config).state_dict().keys() == release.former.keys()


def write(path: Path, state: dict[str, torch.Tensor], args: bytes) -> None:
    """A torch file of {"model": state, "args": ...} whose arguments are these pickle opcodes."""
    buffer = io.BytesIO()
    torch.save({"model": state, "args": "PLACE"}, buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for member in stored.namelist():
            out.writestr(member, stored.read(member).replace(PLACE, args))


def test_weights_survive_the_way_out_and_back() -> None:
    _, denoiser, weights = small_release()
    checkpoint = {"model": weights}
    back = VideoFormer.from_official(checkpoint, FORMER), ActionDenoiser.from_official(checkpoint, DENOISER)
    again = release_weights(*back)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    for prefix in ("", "inner_model.", "model.inner_model."):
        bare = {prefix + name: value for name, value in denoiser.state_dict().items()}
        assert ActionDenoiser.from_official(bare, DENOISER).state_dict().keys() == denoiser.state_dict().keys()


def test_linear_variant_has_the_releases_bare_names() -> None:
    config = FORMER.model_copy(update={"kind": "linear"})
    former, denoiser = VideoFormer(config), ActionDenoiser(DENOISER)
    weights = release_weights(former, denoiser)
    assert {"Video_Former.weight", "Video_Former.bias"} == {name for name in weights if name.startswith("Video")}
    back = VideoFormer.from_official(weights)
    assert (back.config.kind, back.config.condition_dim, back.config.dim) == ("linear", 24, 32)
    assert torch.equal(back.project.weight, former.project.weight)


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


def test_code_in_the_arguments_is_refused_in_one_line(tmp_path: Path) -> None:
    _, _, weights = small_release()
    witness, path = tmp_path / "witness", tmp_path / "dp.pt"
    torch.save({"model": weights, "args": Payload(witness)}, path)
    with pytest.raises(
        InputError, match=r"dp\.pt is not a checkpoint of plain tensors: it holds \w+\.mkdir\."
    ) as raised:
        read_release(path, former_config=FORMER, denoiser_config=DENOISER)
    assert "\n" not in str(raised.value)
    assert not witness.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "omegaconf.resolvers.Call", "typing.get_type_hints"]
)
def test_names_beside_the_allowed_ones_are_refused(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    path = tmp_path / "dp.pt"
    write(path, {}, f"c{module}\n{function}\n".encode() + b"X\x01\x00\x00\x001\x85R")  # its call with "1"
    with pytest.raises(InputError, match="is not a checkpoint of plain tensors"):
        read_release(path)


def test_settings_are_read_only_where_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "dp.pt", {}, SETTINGS)
    content = read_checkpoint(tmp_path / "dp.pt", settings=True)
    assert isinstance(content["args"], PassedOver)
    with pytest.raises(InputError, match=r"it holds omegaconf\.dictconfig\.DictConfig"):
        read_checkpoint(tmp_path / "dp.pt")


def broken(weights: dict[str, torch.Tensor], **changes: object) -> dict[str, object]:
    left = {name: value for name, value in weights.items() if changes.get(name, value) is not None}
    return left | {name: value for name, value in changes.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Video_Former.norm.bias": None}, "norm.bias is missing"),
        ({"Video_Former.layers.1.2.1.weight": torch.zeros(128, 31)}, r"layers.1.2.1.weight is \(128, 31\) where"),
        ({"Video_Former.extra": torch.zeros(1)}, "extra is unknown"),
        ({"Video_Former.latents": "no tensor"}, "latents of the Video-Former is no tensor"),
    ],
)
def test_former_weights_that_do_not_fit_are_named_in_one_line(changes, said) -> None:
    _, _, weights = small_release()
    with pytest.raises(InputError, match=said) as raised:
        VideoFormer.from_official(broken(weights, **changes), FORMER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.inner_model.pos_emb": None}, "pos_emb is missing"),
        ({"model.inner_model.decoder.blocks.1.ln3.bias": torch.zeros(7)}, r"ln3.bias is \(7,\) where"),
        ({"model.inner_model.action_pred.weight": torch.zeros(8, 32)}, r"action_pred.weight is \(8, 32\) where"),
    ],
)
def test_denoiser_weights_that_do_not_fit_are_named_in_one_line(changes, said) -> None:
    _, _, weights = small_release()
    with pytest.raises(InputError, match=said) as raised:
        ActionDenoiser.from_official(broken(weights, **changes), DENOISER)
    assert "\n" not in str(raised.value)


def test_other_checkpoints_are_refused() -> None:
    _, _, weights = small_release()
    former_only = {name: value for name, value in weights.items() if name.startswith("Video_Former")}
    with pytest.raises(InputError, match=r"no weight is named model\.inner_model\. or inner_model\.\*"):
        ActionDenoiser.from_official(former_only, DENOISER)
    with pytest.raises(InputError, match=r"no weight is named Video_Former\.\*"):
        VideoFormer.from_official({}, FORMER)
    with pytest.raises(InputError, match=r"tok_emb\.weight is missing"):
        ActionDenoiser.from_official({"fc.weight": torch.zeros(3, 3)})


def test_widths_that_hide_the_number_of_heads_need_a_config() -> None:
    _, _, weights = small_release()
    with pytest.raises(InputError, match="inner width 32, the release 512; the number of heads is not in the weights"):
        VideoFormer.from_official(weights)
    with pytest.raises(InputError, match="width 32, the release 384; the number of heads is not in the weights"):
        ActionDenoiser.from_official(weights)
