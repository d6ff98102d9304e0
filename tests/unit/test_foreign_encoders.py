"""Encoders over other people's weights: timm's own features come out, Voltron's equations hold, misfits are named."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn.functional import conv2d, silu

from infra.errors import InputError
from training.models.common.foreign_encoders import TimmEncoder, VoltronEncoder, VoltronFeatures
from training.models.common.plain_features import EncoderFeatures
from training.protocols import Encoder, FeatureProvider

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def trained(name: str, **options: Any) -> Any:
    """A timm model whose weights and statistics are not those of a fresh one."""
    torch.manual_seed(3)
    model = timm.create_model(name, **options).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(torch.rand_like(value), alpha=0.05 if "var" not in key else 0.5)
    return model


@pytest.mark.parametrize(("name", "stride", "suffix"), [
    ("test_vit", 16, ".safetensors"), ("test_efficientnet", 32, ".pth"), ("test_resnet", 32, ".pth"),
])  # fmt: skip
def test_timms_features_come_out_class_row_first(tmp_path: Path, name: str, stride: int, suffix: str) -> None:
    model, path = trained(name, num_classes=10), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    encoder = TimmEncoder(name, path)
    images = encoder.preprocess(PICTURES)
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    grey = encoder.preprocess(np.full((1, 9, 9, 3), 51, np.uint8))[0, :, 0, 0]
    torch.testing.assert_close(grey, (0.2 - mean) / std)
    with torch.no_grad():
        features = model.forward_features(images)
    if features.ndim == 4:
        rows = torch.stack([features[:, :, y, x] for y in range(5) for x in range(5)], dim=1)
        features = torch.cat([features.mean((2, 3))[:, None], rows], dim=1)
    found = encoder.encode(images)
    torch.testing.assert_close(found, features, atol=1e-5, rtol=1e-5)
    assert isinstance(encoder, Encoder)
    assert (encoder.image_size, encoder.patch_size, encoder.embed_dim) == (160, stride, found.shape[2])
    assert found.shape[1] == 1 + (160 // stride) ** 2
    provider = EncoderFeatures(encoder)
    assert tuple(provider.features({"main": PICTURES}, ["", "", ""]).shape[1:]) == provider.feature_shape


def test_a_transformer_takes_other_sizes(tmp_path: Path) -> None:
    torch.save(trained("test_vit").state_dict(), tmp_path / "vit.pth")
    encoder = TimmEncoder("test_vit", tmp_path / "vit.pth", image_size=96)
    assert (encoder.image_size, encoder.patch_size) == (96, 16)
    assert encoder.encode(encoder.preprocess(PICTURES)).shape == (3, 37, 64)
    assert encoder.encode(encoder.preprocess(PICTURES, (32, 64))).shape == (3, 9, 64)


def test_names_may_differ_where_the_order_agrees(tmp_path: Path) -> None:
    model = trained("test_efficientnet")
    renamed = {
        f"_part_{number}.{name.rpartition('.')[2]}": value
        for number, (name, value) in enumerate(model.state_dict().items())
    }
    torch.save(renamed, tmp_path / "renamed.pth")
    encoder = TimmEncoder("test_efficientnet", tmp_path / "renamed.pth", match="order")
    images = encoder.preprocess(PICTURES)
    with torch.no_grad():
        expected = model.forward_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.encode(images)[:, 1:], expected)
    with pytest.raises(
        InputError, match=r"renamed\.pth does not fit test_efficientnet: .*conv_stem\.weight is missing"
    ):
        TimmEncoder("test_efficientnet", tmp_path / "renamed.pth")

    names = list(renamed)
    torch.save({name: renamed[name] for name in names[:-1]}, tmp_path / "short.pth")
    with pytest.raises(InputError, match=f"{len(names) - 1} tensors where {len(names)} are needed"):
        TimmEncoder("test_efficientnet", tmp_path / "short.pth", match="order")
    # Weight and bias of a norm have one shape: only their names tell that they are exchanged.
    swapped = [names[0], names[2], names[1], *names[3:]]
    torch.save({name: renamed[name] for name in swapped}, tmp_path / "swapped.pth")
    with pytest.raises(InputError, match=r"tensor 1 is _part_2\.bias .* where bn1\.weight"):
        TimmEncoder("test_efficientnet", tmp_path / "swapped.pth", match="order")
    safetensors.torch.save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="does not keep the order"):
        TimmEncoder("test_efficientnet", tmp_path / "renamed.safetensors", match="order")


def test_misfits_are_named(tmp_path: Path) -> None:
    torch.save(trained("test_resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(InputError, match=r"resnet\.pth does not fit test_vit: .* is missing"):
        TimmEncoder("test_vit", tmp_path / "resnet.pth")
    with pytest.raises(InputError, match="knows no model 'test_vitt'"):
        TimmEncoder("test_vitt", tmp_path / "resnet.pth")
    with pytest.raises(InputError, match=r"nowhere\.safetensors do not exist"):
        TimmEncoder("test_vit", tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"broken\.safetensors is no safetensors file"):
        TimmEncoder("test_vit", tmp_path / "broken.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="holds no weights"):
        TimmEncoder("test_vit", tmp_path / "empty.pth")


def test_digests_name_model_file_and_setting_and_random_says_so(tmp_path: Path) -> None:
    state = trained("test_vit").state_dict()
    torch.save(state, tmp_path / "one.pth")
    (tmp_path / "same.pth").write_bytes((tmp_path / "one.pth").read_bytes())
    torch.save(state | {"norm.bias": state["norm.bias"] + 1}, tmp_path / "other.pth")
    one, same = (TimmEncoder("test_vit", tmp_path / name).digest for name in ("one.pth", "same.pth"))
    assert one == same
    before = torch.random.get_rng_state()
    drawn = [TimmEncoder.random("test_vit", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    images = drawn[0].preprocess(PICTURES)
    assert torch.equal(drawn[0].encode(images), drawn[1].encode(images)) and drawn[0].digest == drawn[1].digest
    assert not torch.equal(drawn[0].encode(images), drawn[2].encode(images))
    digests = {
        one,
        TimmEncoder("test_vit", tmp_path / "other.pth").digest,
        TimmEncoder("test_vit", tmp_path / "one.pth", image_size=96).digest,
        TimmEncoder("test_vit", tmp_path / "one.pth", match="order").digest,
        *(encoder.digest for encoder in drawn),
    }
    assert len(digests) == 6


WIDTH, DEPTH, HEADS, PATCH, LM_WIDTH = 32, 2, 2, 8, 64
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "open", "the", "drawer"]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DistilBERT as transformers writes it; its words are few."""
    from transformers import DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("distilbert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=120, dim=LM_WIDTH, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32
    )
    DistilBertModel(config).save_pretrained(folder)
    return folder


def voltron_weights(kind: str) -> dict[str, torch.Tensor]:
    """Weights under the official names, decoder included, as the package's checkpoints have them."""
    torch.manual_seed(5)
    rows = 16 + (kind == "v-cond with class token")
    shapes: dict[str, tuple[int, ...]] = {
        "patch2embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch2embed.proj.bias": (WIDTH,),
        "encoder_pe": (1, rows, WIDTH), "encoder_norm.g": (WIDTH,),
        "lang2encoder.weight": (WIDTH, LM_WIDTH), "lang2encoder.bias": (WIDTH,),
        "encoder2decoder.weight": (16, WIDTH), "decoder_pe": (1, rows, 16), "mask_token": (1, 1, 16),
    }  # fmt: skip
    for number in range(DEPTH):
        at = f"encoder_blocks.{number}"
        shapes |= {
            f"{at}.pre_norm_attn.g": (WIDTH,), f"{at}.pre_norm_mlp.g": (WIDTH,),
            f"{at}.layer_scale_attn.gamma": (WIDTH,), f"{at}.layer_scale_mlp.gamma": (WIDTH,),
            f"{at}.attn.qkv.weight": (3 * WIDTH, WIDTH), f"{at}.attn.qkv.bias": (3 * WIDTH,),
            f"{at}.attn.proj.weight": (WIDTH, WIDTH), f"{at}.attn.proj.bias": (WIDTH,),
            f"{at}.mlp.0.project.weight": (8 * WIDTH, WIDTH), f"{at}.mlp.0.project.bias": (8 * WIDTH,),
            f"{at}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{at}.mlp.2.bias": (WIDTH,),
        }  # fmt: skip
    if kind == "v-gen":
        shapes |= {
            "img_enc_token": (1, 1, 1, WIDTH), "lang_enc_token": (1, 1, WIDTH), "ctx_enc_pe": (1, 2, 1, WIDTH),
            "img_dec_token": (1, 1, 1, 16), "lang_dec_token": (1, 1, 16), "ctx_dec_pe": (1, 2, 1, 16),
        }  # fmt: skip
    else:
        shapes |= {"img_token": (1, 1, WIDTH), "lang_token": (1, 1, WIDTH)}
    if rows == 17:
        shapes["cls_token"] = (1, 1, WIDTH)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def save_voltron(folder: Path, kind: str, *, lm: Path | None = None) -> Path:
    """`NAME.pt` and `NAME-config.json` as the package downloads them."""
    weights = voltron_weights(kind)
    if lm is not None:
        stored = safetensors.torch.load_file(lm / "model.safetensors")
        weights |= {f"lm.{name}": value for name, value in stored.items()}
        weights["lm.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save((weights, {"state": {}, "param_groups": [{"lr": 1e-4}]}), folder / "voltron.pt")
    (folder / "voltron-config.json").write_text(json.dumps({"encoder_n_heads": HEADS, "resolution": 32}))
    return folder / "voltron.pt"


def language_states(folder: Path, words: list[str] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of 20 tokens: [CLS] words [SEP] and padding; None: a start mark (101 or the vocabulary's)."""
    from transformers import DistilBertModel

    numbers = [2] if words is None else [2, *(VOCABULARY.index(word) for word in words), 3]
    tokens = torch.tensor([numbers + [0] * (20 - len(numbers))])
    mask = torch.tensor([[1] * len(numbers) + [0] * (20 - len(numbers))])
    with torch.no_grad():
        return DistilBertModel.from_pretrained(folder).eval()(tokens, mask).last_hidden_state, mask


def plain_voltron(w: dict[str, torch.Tensor], image: torch.Tensor, states: torch.Tensor, mask: torch.Tensor):
    """(L (+1), D) of one picture, row by row: the published equations with no module."""

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True).sqrt()) * w[f"{name}.g"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = conv2d(image[None], w["patch2embed.proj.weight"], w["patch2embed.proj.bias"], stride=PATCH)
    rows = patches[0].flatten(1).T
    if "cls_token" in w:
        rows = torch.cat([w["cls_token"][0], rows])
    rows = rows + w["encoder_pe"][0]
    if "ctx_enc_pe" in w:
        rows = torch.cat([rows + w["ctx_enc_pe"][0, frame] for frame in (0, 1)]) + w["img_enc_token"][0, 0]
        words = linear(states[0], "lang2encoder") + w["lang_enc_token"][0]
    else:
        rows = rows + w["img_token"][0]
        words = linear(states[0], "lang2encoder") + w["lang_token"][0]
    num_pictures = len(rows)
    x = torch.cat([rows, words])
    real = [1] * num_pictures + mask[0].tolist()
    for number in range(DEPTH):
        at = f"encoder_blocks.{number}"
        query, key, value = linear(rms(x, f"{at}.pre_norm_attn"), f"{at}.attn.qkv").split(WIDTH, dim=1)
        mixed = torch.zeros_like(x)
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            for row in range(len(x)):
                scores = key[:, part] @ query[row, part] * (WIDTH // HEADS) ** -0.5
                scores = scores if real[row] else torch.full_like(scores, torch.finfo(scores.dtype).min)
                mixed[row, part] = scores.softmax(0) @ value[:, part]
        x = x + linear(mixed, f"{at}.attn.proj") * w[f"{at}.layer_scale_attn.gamma"]
        first, gate = linear(rms(x, f"{at}.pre_norm_mlp"), f"{at}.mlp.0.project").split(4 * WIDTH, dim=1)
        x = x + linear(first * silu(gate), f"{at}.mlp.2") * w[f"{at}.layer_scale_mlp.gamma"]
    x = rms(x, "encoder_norm")[:num_pictures]
    return x[num_pictures // 2 :] if "ctx_enc_pe" in w else x


@pytest.mark.parametrize("kind", ["v-cond", "v-cond with class token", "v-gen"])
@pytest.mark.parametrize("words", [["open", "the", "drawer"], None], ids=["sentence", "null text"])
def test_voltron_is_its_equations(tmp_path: Path, language: Path, kind: str, words: list[str] | None) -> None:
    encoder = VoltronEncoder(save_voltron(tmp_path, kind, lm=language), language=str(language))
    images = encoder.preprocess(PICTURES)
    found = encoder.encode(images, None if words is None else [" ".join(words)] * 3)
    states, mask = language_states(language, words)
    expected = torch.stack([plain_voltron(voltron_weights(kind), image, states, mask) for image in images])
    if "class token" not in kind:
        expected = torch.cat([expected.mean(1, keepdim=True), expected], dim=1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert isinstance(encoder, Encoder)
    assert (encoder.image_size, encoder.patch_size, encoder.embed_dim) == (32, PATCH, WIDTH)
    assert encoder.encode(encoder.preprocess(PICTURES, (40, 48))).shape == (3, 31, WIDTH)


def test_the_language_model_may_be_the_checkpoints_or_the_folders(tmp_path: Path, language: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "none").mkdir()
    with_own = VoltronEncoder(save_voltron(tmp_path / "own", "v-cond", lm=language), language=str(language))
    bare = save_voltron(tmp_path / "none", "v-cond")
    with_folders = VoltronEncoder(bare, language=str(language))
    images, text = with_own.preprocess(PICTURES), ["open", "the drawer", "a b"]
    assert torch.equal(with_own.encode(images, text), with_folders.encode(images, text))
    with pytest.raises(InputError, match="even the null text needs one"):
        VoltronEncoder(bare)
    silent = VoltronEncoder(tmp_path / "own" / "voltron.pt")
    assert silent.encode(images).shape == (3, 17, WIDTH)
    with pytest.raises(InputError, match="no tokenizer"):
        silent.encode(images, text)
    with pytest.raises(InputError, match="2 sentences for 3 pictures"):
        with_own.encode(images, text[:2])
    assert len({silent.digest, with_own.digest, with_folders.digest}) == 3


def test_features_follow_the_sentence_where_there_is_a_tokenizer(tmp_path: Path, language: Path) -> None:
    path = save_voltron(tmp_path, "v-cond", lm=language)
    views = {"left": PICTURES, "right": PICTURES[::-1].copy()}
    reading, silent = (
        VoltronFeatures(VoltronEncoder(path, language=folder), cameras=("left", "right"))
        for folder in (str(language), "")
    )
    one, other = (reading.features(views, text) for text in (["open"] * 3, ["the drawer"] * 3))
    assert isinstance(reading, FeatureProvider) and tuple(one.shape[1:]) == reading.feature_shape == (1, 32, WIDTH)
    assert not torch.allclose(one, other, atol=1e-4)
    assert torch.equal(one[:, :, 16:].flip(0), one[:, :, :16])
    assert torch.equal(silent.features(views, ["open"] * 3), silent.features(views, ["the drawer"] * 3))
    assert reading.digest != silent.digest


def test_a_sentence_that_is_too_long_says_that_it_loses_its_end(tmp_path: Path, language: Path, caplog) -> None:
    encoder = VoltronEncoder(save_voltron(tmp_path, "v-cond", lm=language), language=str(language))
    images, long = encoder.preprocess(PICTURES[:1]), " ".join("abcdefgh" * 3)
    with caplog.at_level(logging.WARNING):
        found = encoder.encode(images, [long])
    assert re.search(r"has 26 tokens where Voltron reads 20", caplog.text)
    assert torch.equal(found, encoder.encode(images, [long[:35]]))  # 18 letters and the two marks


def test_files_that_are_no_voltron_are_named(tmp_path: Path, language: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pt do not exist"):
        VoltronEncoder(tmp_path / "nowhere.pt")
    path = save_voltron(tmp_path, "v-cond", lm=language)
    (tmp_path / "voltron-config.json").unlink()
    with pytest.raises(InputError, match=r"width 32.*voltron-config\.json"):
        VoltronEncoder(path)
    torch.save(({"decoder_pe": torch.zeros(1)}, {}), path)
    with pytest.raises(InputError, match=r"has no patch2embed\.proj\.weight"):
        VoltronEncoder(path)
    torch.save((Path("/"), {}), path)
    with pytest.raises(InputError, match="not a checkpoint of plain tensors"):
        VoltronEncoder(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds no state dict"):
        VoltronEncoder(path)
