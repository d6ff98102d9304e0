"""Released weights: our names are the release's below two prefixes, so reading and writing them is a prefix away.

A released `dp-calvin` file is {"model": weights, "args": OmegaConf}. Of its weights `Video_Former.*` and
`model.inner_model.*` are the policy; the CLIP copies beside them are not read into it. Layer counts and widths follow
from the shapes; the number of attention heads does not, so only the released widths are read without a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from infra.errors import InputError
from training.models.common.weights import read_checkpoint
from training.models.vpp.config import ActionDenoiserConfig, VideoFormerConfig

if TYPE_CHECKING:
    from training.models.vpp.denoiser import ActionDenoiser
    from training.models.vpp.former import VideoFormer

FORMER_PREFIX = "Video_Former."
DENOISER_PREFIX = "model.inner_model."
DENOISER_PREFIXES = (DENOISER_PREFIX, "inner_model.")
LINEAR_PREFIX = "project."  # of our linear variant; the release's is the bare linear map
RELEASED_WIDTH, RELEASED_HEADS, RELEASED_HEAD_DIM = 384, 8, 64
RELEASED_CHUNK = 10


class Release(NamedTuple):
    """The policy's part of a released file, under our names."""

    former_config: VideoFormerConfig
    former: dict[str, torch.Tensor]
    denoiser_config: ActionDenoiserConfig
    denoiser: dict[str, torch.Tensor]


def read_release(
    path: Path,
    *,
    former_config: VideoFormerConfig | None = None,
    denoiser_config: ActionDenoiserConfig | None = None,
    proprioception: bool = False,
) -> Release:
    """The weights of a released file and the sizes they have; nothing in the file is run or imported.

    `proprioception` says whether the policy reads the robot's state, which the weights do not tell: CALVIN's does not.
    `InputError` for a file that is no such checkpoint, or holds other code than its OmegaConf arguments.
    """
    checkpoint = read_checkpoint(path, settings=True)
    former, denoiser = former_weights(checkpoint), denoiser_weights(checkpoint)
    former_config = former_config or infer_former_config(former)
    tokens = former_config.num_frames * former_config.num_latents if former_config.kind != "linear" else None
    if denoiser_config is None:
        denoiser_config = infer_denoiser_config(denoiser, num_tokens=tokens)
        if not proprioception:
            denoiser_config = denoiser_config.model_copy(update={"proprioception_dim": 0})
    return Release(former_config, former, denoiser_config, denoiser)


def release_weights(former: VideoFormer | None, denoiser: ActionDenoiser) -> dict[str, torch.Tensor]:
    """Both modules' weights under the release's names, to be saved as its key `model`."""
    weights: dict[str, torch.Tensor] = {}
    if former is not None:
        for name, value in former.state_dict().items():
            weights[FORMER_PREFIX + name.removeprefix(LINEAR_PREFIX)] = value
    return weights | {DENOISER_PREFIX + name: value for name, value in denoiser.state_dict().items()}


def former_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Our names of the Video-Former's weights in a checkpoint, or in a state dict with or without the prefix."""
    found = _below((FORMER_PREFIX,), _state(checkpoint), "Video-Former")
    if "weight" in found:
        return {LINEAR_PREFIX + name: value for name, value in found.items()}
    return found


def denoiser_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Our names of the action denoiser's weights, as `former_weights`."""
    return _below(DENOISER_PREFIXES, _state(checkpoint), "action denoiser")


def infer_former_config(weights: Mapping[str, torch.Tensor]) -> VideoFormerConfig:
    """Sizes of a Video-Former of the released width from its weights under our names."""
    if "project.weight" in weights:
        dim, condition = weights["project.weight"].shape
        return VideoFormerConfig(kind="linear", dim=dim, condition_dim=condition)
    frames, latents, dim = _shape(weights, "latents", 3)
    inner = _shape(weights, "layers.0.0.to_q.weight", 2)[0]
    if inner != RELEASED_HEADS * RELEASED_HEAD_DIM:
        raise _heads_unknown("Video-Former", f"inner width {inner}", RELEASED_HEADS * RELEASED_HEAD_DIM)
    kind: Literal["3d", "2d"] = "3d" if "layers.0.1.qkv.weight" in weights else "2d"
    return VideoFormerConfig(
        kind=kind,
        condition_dim=_shape(weights, "goal_emb.0.weight", 2)[1],
        dim=dim,
        depth=_count(weights, "layers."),
        num_frames=frames,
        num_latents=latents,
        mlp_ratio=_shape(weights, f"layers.0.{2 if kind == '3d' else 1}.1.weight", 2)[0] // dim,
    )


def infer_denoiser_config(
    weights: Mapping[str, torch.Tensor], *, num_tokens: int | None = None
) -> ActionDenoiserConfig:
    """Sizes of an action denoiser of the released width from its weights under our names.

    The chunk follows from the position table when the number of context tokens is given, else it is the release's 10.
    """
    dim, token_dim = _shape(weights, "tok_emb.weight", 2)
    if dim != RELEASED_WIDTH:
        raise _heads_unknown("action denoiser", f"width {dim}", RELEASED_WIDTH)
    positions = _shape(weights, "pos_emb", 3)[1]
    chunk = positions - 1 - (positions - 1 - RELEASED_CHUNK if num_tokens is None else num_tokens)
    if not 1 <= chunk < positions:
        raise InputError(
            f"pos_emb has {positions} places, too few for a goal, {num_tokens} tokens and a chunk.",
            remedy="Give a config of the denoiser.",
        )
    return ActionDenoiserConfig(
        action_dim=_shape(weights, "action_pred.weight", 2)[0],
        chunk=chunk,
        token_dim=token_dim,
        num_tokens=positions - 1 - chunk,
        goal_dim=_shape(weights, "lang_emb.0.weight", 2)[1],
        proprioception_dim=_shape(weights, "proprio_emb.0.weight", 2)[1],
        dim=dim,
        encoder_layers=_count(weights, "encoder.blocks."),
        decoder_layers=_count(weights, "decoder.blocks."),
        num_heads=RELEASED_HEADS,
    )


def _state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    model = checkpoint.get("model")
    return model if isinstance(model, Mapping) else checkpoint


def _below(prefixes: tuple[str, ...], state: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """Tensors under the first prefix that occurs, without it; all of them where no name has a prefix of ours."""
    ours = (FORMER_PREFIX, *DENOISER_PREFIXES)
    for prefix in prefixes:
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if found:
            break
    else:
        if not state or any(str(name).startswith(ours) for name in state):
            raise InputError(
                f"no weight is named {' or '.join(prefixes)}*.", remedy=f"Give a checkpoint with a {what}."
            )
        found = dict(state)
    if wrong := [name for name, value in found.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{wrong[0]} of the {what} is no tensor.", remedy="Give the released checkpoint.")
    return found


def _shape(weights: Mapping[str, torch.Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in weights:
        raise InputError(f"{name} is missing.", remedy="Give the released checkpoint, or a config of its sizes.")
    shape = tuple(weights[name].shape)
    if len(shape) != axes:
        raise InputError(
            f"{name} is {shape} where the release has {axes} axes.", remedy="Give the released checkpoint."
        )
    return shape


def _count(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    return max(1, len(numbers))


def _heads_unknown(what: str, found: str, released: int) -> InputError:
    return InputError(
        f"the {what} has {found}, the release {released}; the number of heads is not in the weights.",
        remedy="Give a config.",
    )
