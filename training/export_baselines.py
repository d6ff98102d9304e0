"""Exports of the policies beside the Video Prediction Policy: Diffusion Policy, Uni-Pi style, Susie style.

A Diffusion Policy's export is whole. The other two name their video model, which must have the digest that they were
trained with; `video` says where it lies if it has moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from infra.errors import InputError
from infra.storage import absolute
from training.export_files import Export, ModelReference, model_card, read_export, save_export
from training.export_video import FrozenVideoModel, load_video_model, video_config, video_digest
from training.models.common.weights import load_weights
from training.models.diffusion_policy import DiffusionPolicy, DiffusionPolicyNetwork, StoredDiffusionPolicy
from training.models.inverse_dynamics import InverseDynamicsNetwork, StoredUniPiPolicy, UniPiPolicy
from training.models.subgoal import StoredSubgoalPolicy, SubgoalNetwork, SusiePolicy

__all__ = [
    "VideoSizes", "load_diffusion_policy", "load_susie", "load_unipi", "save_policy", "video_reference", "video_sizes",
]  # fmt: skip

DIFFUSION_KIND, UNIPI_KIND, SUSIE_KIND = "diffusion-policy", "unipi-policy", "susie-policy"
LOADING = "Use `training.export.load_policy(folder)`; the weights are plain safetensors."
LOADING_WITH_VIDEO = (
    f"{LOADING} The video model is not in this folder:\n`config.json` names it by digest. If it has moved, give its "
    "place: `load_policy(folder, provider=URL)`."
)


class VideoSizes(NamedTuple):
    """What a policy must know of a video model before it is loaded."""

    num_frames: int
    image_size: int


def load_diffusion_policy(source: Export | str | Path, *, device: torch.device | str = "cpu") -> DiffusionPolicy:
    """The policy of an export; `InputError` for an export of another kind."""
    export = _read(source, DIFFUSION_KIND, "train-diffusion-policy")
    config = StoredDiffusionPolicy.parse(export.model_config)
    network = DiffusionPolicyNetwork(config.network)
    load_weights(network, export.weights)
    return DiffusionPolicy(network.to(device), config, digest=export.digest)


def load_unipi(
    source: Export | str | Path, *, video: str = "", autocast: bool = False, device: torch.device | str = "cpu"
) -> UniPiPolicy:
    """Inverse dynamics and the video model it belongs to; `InputError` for a model of another digest."""
    export = _read(source, UNIPI_KIND, "train-unipi")
    config = StoredUniPiPolicy.parse(export.model_config)
    network = InverseDynamicsNetwork(config.network)
    load_weights(network, export.weights)
    model = _referenced(export, config.video, video, autocast=autocast).to(device)
    return UniPiPolicy(network.to(device), model, config, noise_shape=noise_shape(model), digest=export.digest)


def load_susie(
    source: Export | str | Path, *, video: str = "", autocast: bool = False, device: torch.device | str = "cpu"
) -> SusiePolicy:
    """The goal-conditioned policy and the video model that gives its goals; `InputError` for another digest."""
    export = _read(source, SUSIE_KIND, "train-susie")
    config = StoredSubgoalPolicy.parse(export.model_config)
    network = SubgoalNetwork(config.network)
    load_weights(network, export.weights)
    model = _referenced(export, config.video, video, autocast=autocast).to(device)
    return SusiePolicy(network.to(device), model, config, noise_shape=noise_shape(model), digest=export.digest)


def save_policy(
    folder: str,
    policy: DiffusionPolicy | UniPiPolicy | SusiePolicy,
    *,
    title: str,
    summary: str,
    facts: Mapping[str, object],
    limits: str,
    inputs: Sequence[str],
) -> str:
    """Write the export of a trained policy and return its digest; the video model is named, not copied."""
    kinds = {DiffusionPolicy: DIFFUSION_KIND, UniPiPolicy: UNIPI_KIND, SusiePolicy: SUSIE_KIND}
    loading = LOADING if isinstance(policy, DiffusionPolicy) else LOADING_WITH_VIDEO
    return save_export(
        folder,
        kind=kinds[type(policy)],
        model_config=policy.config,
        weights=policy.network.state_dict(),
        preprocessing=policy.preprocessing,
        card=model_card(title, summary=summary, facts=facts, limits=limits, loading=loading),
        inputs=inputs,
    )


def video_reference(url: str) -> ModelReference:
    """Where a video model is now and what names it, without reading its weights."""
    return ModelReference(url=absolute(url), digest=video_digest(url))


def video_sizes(url: str) -> VideoSizes:
    """Frames and pixels of a video model, without reading its weights; `InputError` for another kind of export."""
    config = video_config(url)
    return VideoSizes(config.num_frames, config.image_size)


def noise_shape(video: FrozenVideoModel) -> tuple[int, int, int, int]:
    """(T, C, h, w) of a video model's latents."""
    vae = video.config.vae
    side = video.image_size // vae.downscale
    return video.num_frames, vae.latent_channels, side, side


def _read(source: Export | str | Path, kind: str, step: str) -> Export:
    export = source if isinstance(source, Export) else read_export(source)
    if export.kind != kind:
        raise InputError(f"{export.url} is a {export.kind!r} export.", remedy=f"Give the export of a {step} run.")
    return export


def _referenced(export: Export, wanted: ModelReference, moved: str, *, autocast: bool) -> FrozenVideoModel:
    url = moved or wanted.url
    found = video_digest(url)
    if found != wanted.digest:
        raise InputError(
            f"{export.url} was trained with video model {wanted.digest[:12]}, {url} is {found[:12]}.",
            remedy="Name the model it was trained with.",
        )
    return load_video_model(url, autocast=autocast)
