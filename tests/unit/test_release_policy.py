"""A released policy becomes an export that acts, and an export goes back under the release's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.errors import InputError
from tests.helpers_text import make_clip_folder
from tests.helpers_tvp import tiny_model
from training.export import load_policy, save_video_export
from training.models.vpp import ActionDenoiser, ActionDenoiserConfig, VideoFormer, VideoFormerConfig
from training.protocols import Observation
from training.providers import parse_provider
from training.release_policy import export_release, import_release

CHANNELS = 128  # of the two up-blocks of the small video model


def released(folder: Path, *, condition_dim: int = CHANNELS) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file in the release's form: {"model": weights under its names, with CLIP's beside them}."""
    torch.manual_seed(0)
    former = VideoFormer(VideoFormerConfig(condition_dim=condition_dim, depth=1, num_frames=4, num_latents=2))
    denoiser = ActionDenoiser(ActionDenoiserConfig(encoder_layers=1, decoder_layers=1, num_tokens=8))
    weights = {f"Video_Former.{name}": value for name, value in former.state_dict().items()}
    weights |= {f"model.inner_model.{name}": value for name, value in denoiser.state_dict().items()}
    path = folder / "dp-calvin.pt"
    torch.save({"model": weights | {"language_goal.clip_rn50.logit_scale": torch.zeros(())}}, path)
    return path, weights


@pytest.fixture
def parts(tmp_path: Path):
    save_video_export(tmp_path / "video", tiny_model(), card="A test.", inputs=["data"])
    (tmp_path / "clip").mkdir()
    clip = make_clip_folder(tmp_path / "clip", projection_dim=512)
    cameras = ["static", "gripper"]
    return parse_provider({"kind": "tvp", "url": str(tmp_path / "video"), "cameras": cameras}), str(clip)


def test_there_and_back(parts, tmp_path):
    provider, clip = parts
    path, weights = released(tmp_path)
    import_release(path, str(tmp_path / "export"), provider=provider, clip=clip)
    policy = load_policy(tmp_path / "export")
    assert (policy.cameras, policy.action_horizon) == (("static", "gripper"), 10)
    images = {camera: np.random.default_rng(0).integers(0, 255, (2, 40, 40, 3), np.uint8) for camera in policy.cameras}
    policy.reset(2)
    chunk = policy.act(Observation(images, np.zeros((2, 15), np.float32), ("open it", "close it"), ("a", "b")))
    assert chunk.shape == (2, 10, 7) and np.abs(chunk).max() <= 1
    assert set(np.unique(chunk[..., 6])) <= {-1.0, 1.0}  # the gripper opens or closes
    export_release(str(tmp_path / "export"), str(tmp_path / "back.safetensors"))
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_a_video_model_of_another_width_is_named(parts, tmp_path):
    path, _ = released(tmp_path, condition_dim=96)
    with pytest.raises(InputError, match="reads features 96 wide, they are 128 wide"):
        import_release(path, str(tmp_path / "export"), provider=parts[0], clip=parts[1])
