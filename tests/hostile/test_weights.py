"""Weights from strangers: nothing in them runs, whatever they are called."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from infra.digests import sha256_file
from infra.errors import InputError
from tests.helpers_models import CONFIG, export_rsp, perturbed
from training.export import load_encoder
from training.models.common.weights import read_checkpoint
from training.models.rsp import RSP
from training.models.rsp.official import encoder_weights


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


def test_pickle_with_code_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "model.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}, "args": Payload(witness)}, path)
    with pytest.raises(InputError, match=r"model\.pth is not a checkpoint of plain tensors"):
        read_checkpoint(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_broken_checkpoints_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pth"):
        read_checkpoint(path)


def test_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    export_rsp(tmp_path, perturbed())
    witness, weights = tmp_path / "witness", tmp_path / "model.safetensors"
    for data in (pickle.dumps(Payload(witness)), (10**18).to_bytes(8, "little") + b"{}", b""):
        weights.write_bytes(data)
        with pytest.raises(InputError, match=r"model\.safetensors has sha256"):
            load_encoder(tmp_path)
        # Even when the record vouches for the file.
        record = json.loads((tmp_path / "export.json").read_text())
        (tmp_path / "export.json").write_text(json.dumps(record | {"digest": sha256_file(weights)}))
        with pytest.raises(InputError, match=r"model\.safetensors is no safetensors file"):
            load_encoder(tmp_path)
        (tmp_path / "export.json").write_text(json.dumps(record))
    assert not witness.exists()


def test_official_checkpoint_with_namespace_and_prefixes_loads(tmp_path: Path) -> None:
    model, path = perturbed(), tmp_path / "checkpoint-199.pth"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 199, "args": argparse.Namespace(lr=1e-3, model="rsp")}, path)
    checkpoint = read_checkpoint(path)
    loaded = RSP.from_official(checkpoint, CONFIG)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert {name.split(".")[0] for name in encoder_weights(checkpoint)} == {
        "cls_token", "pos_embed", "patch_embed", "blocks", "norm",
    }  # fmt: skip


def test_weights_of_another_size_are_named() -> None:
    state = perturbed().state_dict()
    wide = CONFIG.model_copy(update={"embed_dim": 64})
    with pytest.raises(InputError, match=r"cls_token is \(1, 1, 48\) where the config needs \(1, 1, 64\)"):
        RSP.from_official(state, wide)
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"norm\.bias is missing"):
        RSP.from_official(state, CONFIG)
