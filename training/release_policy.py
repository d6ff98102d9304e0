"""Released Video Prediction Policies (`dp-calvin`) as exports, and exports as weights under the release's names.

A released file holds neither the video model nor its text encoder's folder: both are named when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch

from infra.digests import sha256_file
from infra.errors import InputError
from infra.storage import write_bytes
from training.export_policies import VPP_KIND, save_vpp
from training.models.common.actions import ActionCodec, CodecConfig
from training.models.common.text import SentenceEncoderConfig
from training.models.vpp import PolicyNetwork, SamplingConfig, VPPConfig
from training.models.vpp.official import read_release, release_weights
from training.models.vpp.policy import network_of

if TYPE_CHECKING:
    from training.providers import VideoProviderConfig

GRIPPER = 6  # of CALVIN's seven action numbers; open or close by sign
CALVIN_SIGMA_MIN = 1.0  # the release's evaluation, in place of training's 0.001


def import_release(path: Path, output: str, *, provider: VideoProviderConfig, clip: str) -> str:
    """A released policy as an export on `provider`'s features; `clip` is a folder of CLIP ViT-B/32. Returns its digest.

    Actions are CALVIN's: relative, in [-1, 1], ten predicted and carried out, the gripper by sign. `InputError` when
    the file is no release, or the provider's features have another width.
    """
    from training.providers import build_provider, references

    release = read_release(path)
    built = build_provider(provider)
    if built.feature_dim != release.former_config.condition_dim:
        found = f"{built.feature_dim} wide from {provider.url}"
        raise InputError(
            f"{path} reads features {release.former_config.condition_dim} wide, they are {found}.",
            remedy="Name the video model it was trained with.",
        )
    frames, tokens, _ = built.feature_shape
    if release.former_config.kind != "linear" and frames != release.former_config.num_frames:
        raise InputError(
            f"{path} reads {release.former_config.num_frames} frames, {provider.url} gives {frames}.",
            remedy="Keep all frames of the video model (frames=0).",
        )
    if release.former_config.kind == "linear" and frames * tokens != release.denoiser_config.num_tokens:
        raise InputError(
            f"{path} reads {release.denoiser_config.num_tokens} tokens, {provider.url} gives {frames * tokens}.",
            remedy="Name the cameras and the pooling that it was trained with.",
        )
    width = release.denoiser_config.action_dim
    config = VPPConfig(
        former=release.former_config,
        denoiser=release.denoiser_config,
        sampling=SamplingConfig(sigma_min=CALVIN_SIGMA_MIN),
        codec=ActionCodec(
            config=CodecConfig(scaling="none", binary=(GRIPPER,)),
            offset=(0.0,) * width,
            scale=(1.0,) * width,
            state_offset=(),
            state_scale=(),
        ),
        text=SentenceEncoderConfig(kind="clip", path=clip),
        provider=provider.to_json(),
        provider_digest=built.digest,
        cameras=built.cameras,
        execute=release.denoiser_config.chunk,
    )
    weights = {f"former.{name}": value for name, value in release.former.items()}
    weights |= {f"denoiser.{name}": value for name, value in release.denoiser.items()}
    fresh = PolicyNetwork.random(config.former, config.denoiser).state_dict()
    statistics = {name: value for name, value in fresh.items() if name.startswith("feature_")}
    source = sha256_file(path)
    return save_vpp(
        output,
        network_of(config, weights | statistics),
        config,
        references=references(provider),
        facts={"released file": path.name, "sha256": source},
        inputs=(source, *(item.digest for item in references(provider))),
    )


def export_release(url: str, path: str) -> None:
    """An export's weights as a safetensors file under the release's names (its key `model`)."""
    from training.export_files import read_export

    export = read_export(url)
    if export.kind != VPP_KIND:
        raise InputError(f"{url} is a {export.kind!r} export.", remedy="Give a Video Prediction Policy.")
    model = {name: value for name, value in export.model_config.items() if name != "references"}
    network = network_of(VPPConfig.parse(model), export.weights)
    weights = release_weights(network.former, network.denoiser)
    write_bytes(path, safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}))
