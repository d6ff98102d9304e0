"""A tiny autoencoder's export and a data set of episodes with two cameras, for caches of their latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from infra.digests import pretty_json
from ingest.schema import CameraRecord, SampleRecord, SourceVideo, frame_suffix
from ingest.shard import Member
from tests.helpers_data import jpeg, key_of, moving_square, source_of, write_dataset
from training.cache import CacheConfig
from training.export_video import save_vae_export
from training.models.common.text import TextEncoderConfig
from training.models.tvp.autoencoder import random_autoencoder
from training.models.tvp.config import VAEConfig

SIZE = 16
TINY_VAE = VAEConfig(block_out_channels=(32, 32), layers_per_block=1, sample_size=SIZE, scaling_factor=0.5)
TEXTS = ("push the block", "open the drawer")


def make_vae(folder: Path, *, seed: int = 0, kind: VAEConfig = TINY_VAE) -> str:
    """Export of a freshly drawn autoencoder: 16 pixels to 4 x 8 x 8 latents."""
    torch.manual_seed(seed)
    vae = random_autoencoder(kind)
    save_vae_export(folder, vae, kind, image_size=SIZE, card="tiny", inputs=[])
    return str(folder)


def make_two_cameras(folder: Path, *, num_clips: int = 5, num_frames: int = 7, size: int = 24, seed: int = 0) -> str:
    """Episodes of `num_frames` + their number frames, two per shard, cameras `main` and `wrist`."""

    def sample(number: int) -> list[Member]:
        count = num_frames + number
        pictures, cameras = [], {}
        for position, name in enumerate(("main", "wrist")):
            frames = moving_square(count, size, seed * 1000 + 10 * number + position)
            pictures += [Member(frame_suffix(index, name), jpeg(frame), index) for index, frame in enumerate(frames)]
            source: SourceVideo = source_of(number)
            cameras[name] = CameraRecord(source=source, width=size, height=size, fps=10.0, num_frames=count)
        record = SampleRecord(
            key=key_of(number),
            source_id=f"square/{number:05d}",
            corpus="synthetic",
            layout="frames",
            cameras=cameras,
            text=TEXTS[number % 2],
            metadata={"split": "validation" if number == 0 else "train"},
        )
        return [Member("json", pretty_json(record.to_json())), *pictures]

    return write_dataset(folder, num_clips, num_frames, sample, layout="frames", clips_per_shard=2)


def config_of(data: str, vae: str, output: Path, **changes: object) -> CacheConfig:
    """A cache of both cameras in this process."""
    values = {"image_size": SIZE, "workers": 0, "batch_frames": 4, "text": TextEncoderConfig(max_tokens=8)}
    return CacheConfig(data=data, vae=vae, output=str(output), **(values | changes))


def plain_moments(vae_folder: str, frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """(T, 2, 4, h, w): diffusers' own autoencoder on frames resized by torch, one frame at a time."""
    from diffusers import AutoencoderKLTemporalDecoder
    from safetensors.torch import load_file

    levels = len(TINY_VAE.block_out_channels)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * levels,
        block_out_channels=TINY_VAE.block_out_channels,
        layers_per_block=TINY_VAE.layers_per_block,
        latent_channels=4,
    ).eval()
    vae.load_state_dict(load_file(Path(vae_folder) / "model.safetensors"))
    rows = []
    for frame in frames_THWC:
        picture = torch.tensor(frame, dtype=torch.float32).permute(2, 0, 1)[None]
        picture = torch.nn.functional.interpolate(picture, size=(size, size), mode="bilinear", align_corners=False)
        with torch.no_grad():
            posterior = vae.encode(picture / 127.5 - 1).latent_dist
        rows.append(torch.stack([posterior.mean[0], posterior.std[0]]).numpy())
    return np.stack(rows)
