"""Sentences to token states: padded, masked, each by itself; the packaged encoder and a local CLIP folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigError, InputError
from tests.helpers_text import make_clip_folder
from training.models.common.text import SentenceEncoder, SentenceEncoderConfig, TextEncoderConfig, TokenEncoder


@pytest.fixture(scope="module")
def minilm() -> TokenEncoder:
    return TokenEncoder(TextEncoderConfig())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return make_clip_folder(tmp_path_factory.mktemp("clip"))


def test_states_are_padded_to_one_length(minilm: TokenEncoder) -> None:
    states = minilm.encode(["press the button", "open it"])
    assert states.shape == (2, 20, minilm.dim) == (2, 20, 384)
    assert states.dtype == torch.float32
    assert not states.requires_grad
    assert minilm.encode([]).shape == (0, 20, 384)


def test_a_sentences_states_do_not_depend_on_its_neighbours(minilm: TokenEncoder) -> None:
    alone = TokenEncoder(TextEncoderConfig()).encode(["open it"])
    assert torch.equal(minilm.encode(["press the button on the table", "open it"])[1], alone[0])


def test_padding_is_masked(minilm: TokenEncoder) -> None:
    """Real tokens have the same states however much padding follows."""
    short = TokenEncoder(TextEncoderConfig(max_tokens=6)).encode(["press the button"])
    assert torch.allclose(short[0, :5], minilm.encode(["press the button"])[0, :5], atol=1e-5)


def test_too_long_a_sentence_is_refused_unless_it_may_be_cut(
    minilm: TokenEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    sentence = "go " * 19
    with pytest.raises(InputError, match="21 tokens where the model reads 20") as caught:
        minilm.encode([sentence])
    assert "\n" not in str(caught.value)
    assert minilm.encode(["go " * 18]).shape == (1, 20, 384)
    cutting = TokenEncoder(TextEncoderConfig(truncate=True))
    cut = cutting.encode([sentence, "go " * 40, sentence])
    assert torch.equal(cut[0], cut[1])
    assert [record.getMessage().count("its end is dropped") for record in caplog.records] == [1, 1]  # once a sentence


def test_digest_names_the_files(minilm: TokenEncoder, clip_folder: Path, tmp_path: Path) -> None:
    assert minilm.digest == TokenEncoder(TextEncoderConfig(max_tokens=8)).digest
    other = TokenEncoder(TextEncoderConfig(kind="clip", path=str(clip_folder)))
    assert len(other.digest) == 64
    assert other.digest != minilm.digest


def test_it_travels_without_its_weights(minilm: TokenEncoder) -> None:
    minilm.encode(["open it"])
    sent = pickle.dumps(minilm)
    assert len(sent) < 1_000_000
    assert torch.equal(pickle.loads(sent).encode(["open it"]), minilm.encode(["open it"]))


def test_clip_states_are_the_last_ones_after_the_norm_with_the_mask(clip_folder: Path) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    encoder = TokenEncoder(TextEncoderConfig(kind="clip", path=str(clip_folder), max_tokens=8))
    assert encoder.dim == 32
    states = encoder.encode(["cab", "f"])
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    model = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()
    inputs = tokenizer(["cab", "f"], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(dim=1).tolist() == [5, 3]
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-5)
    assert states[0].std() > 0.5  # the final norm's scale


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        TokenEncoder(TextEncoderConfig(kind="clip", path=str(folder))).encode(["a"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_hold_no_text_model_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path / "nothing")
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "no .safetensors weights" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert "no clip text encoder" in refused(tmp_path)


def test_a_text_model_that_lacks_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    import shutil

    import safetensors.torch

    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("final_layer_norm.weight"))
    del weights[name]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "final_layer_norm.weight" in refused(folder)


def test_a_clip_sentence_is_the_projected_state_at_its_end_and_not_normalised(clip_folder: Path) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    encoder = SentenceEncoder(SentenceEncoderConfig(kind="clip", path=str(clip_folder)))
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    model = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()
    inputs = tokenizer("open the door", return_tensors="pt")
    with torch.no_grad():
        states = model.text_model(**inputs).last_hidden_state[0]
        expected = model.text_projection(states[-1])  # the end mark is the last token where nothing is padded
    found = encoder.encode(["close it", "open the door"])
    assert found.shape == (2, encoder.dim) == (2, 16)
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert abs(float(found[1].norm()) - 1) > 0.01


def test_a_sentence_encoder_needs_a_folder_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        SentenceEncoder(SentenceEncoderConfig(kind="clip", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="do not go together"):
        SentenceEncoderConfig.parse({"kind": "minilm", "path": "somewhere"})
