"""Predictive features: the UNet's up-blocks at the first (or a later) denoising step, nothing behind them computed.

VPP section 3.2 and the official extractor, which wins where they differ. The pass repeats the order of diffusers'
`UNetSpatioTemporalConditionModel.forward` and ends after the last block asked for; tests/contract compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn import functional as F

from infra.errors import ConfigError
from training.models.tvp.sampler import euler_sample
from training.models.tvp.schedule import SIGMA_MAX, full_precision, karras_sigmas, precondition

if TYPE_CHECKING:
    from training.models.tvp.model import Condition, TextGuidedVideoModel

Interpolation = Literal["nearest", "bilinear"]
NO_GUIDANCE = (1.0, 1.0)


@dataclass(frozen=True)
class FeatureTap:
    """Which activations are taken, and when; `ConfigError` for what does not exist."""

    layers: tuple[int, ...]
    aggregate: bool
    interpolation: Interpolation
    sigma: float | None
    num_steps: int
    step: int

    def __post_init__(self) -> None:
        if not 1 <= self.step <= self.num_steps:
            raise ConfigError(f"step {self.step} of {self.num_steps} does not exist.", remedy="Steps count from 1.")
        if self.interpolation not in get_args(Interpolation):
            raise ConfigError(f"unknown interpolation {self.interpolation!r}.", remedy="Take nearest or bilinear.")

    @torch.no_grad()
    def extract(
        self,
        model: TextGuidedVideoModel,
        unit_noise_BTChw: torch.Tensor,
        tokens_BLD: torch.Tensor,
        condition: Condition,
    ) -> torch.Tensor:
        """(B, T, C, H, W) float32."""
        self._check_layers(len(model.unet.up_blocks))
        sigma_max = SIGMA_MAX if self.sigma is None else self.sigma
        fps = model.config.extract_fps
        latents = euler_sample(
            model, unit_noise_BTChw, tokens_BLD, condition,
            num_steps=self.num_steps, guidance=NO_GUIDANCE, fps=fps, sigma_max=sigma_max, stop_after=self.step - 1,
        )  # fmt: skip
        factors = precondition(karras_sigmas(self.num_steps, sigma_max=sigma_max)[self.step - 1].to(latents))
        inputs = model.network_inputs(latents * factors.c_in, tokens_BLD, condition=condition, fps=fps)
        outputs = up_block_outputs(
            model.unet, *inputs, time_B=factors.c_noise.expand(len(latents)), last=max(self.layers)
        )
        return self._join([outputs[layer] for layer in self.layers])

    def _check_layers(self, num_blocks: int) -> None:
        rising = all(earlier < later for earlier, later in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not rising or not 0 <= min(self.layers) <= max(self.layers) < num_blocks:
            raise ConfigError(
                f"layers {self.layers} are not rising up-blocks of 0 to {num_blocks - 1}.", remedy="E.g. (0, 1)."
            )

    def _join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        clips, frames = outputs[-1].shape[:2]
        size = outputs[-1].shape[-2:]
        taken = outputs if self.aggregate else outputs[-1:]
        resized = [
            F.interpolate(full_precision(output).flatten(0, 1), size, mode=self.interpolation) for output in taken
        ]
        return torch.cat(resized, dim=1).unflatten(0, (clips, frames)).float()


def up_block_outputs(
    unet: Any,
    inputs_BTChw: torch.Tensor,
    tokens_BLD: torch.Tensor,
    ids_B3: torch.Tensor,
    *,
    time_B: torch.Tensor,
    last: int,
) -> list[torch.Tensor]:
    """Outputs (B, T, C, H, W) of up-blocks 0 to `last`, for the inputs of the UNet's own forward pass."""
    clips, frames = inputs_BTChw.shape[:2]
    code = unet.time_embedding(unet.time_proj(time_B).to(inputs_BTChw.dtype))
    id_code = unet.add_time_proj(ids_B3.flatten()).reshape(clips, -1).to(code.dtype)
    code = (code + unet.add_embedding(id_code)).repeat_interleave(frames, dim=0)
    shared = {
        "temb": code,
        "image_only_indicator": torch.zeros(clips, frames, dtype=inputs_BTChw.dtype, device=inputs_BTChw.device),
    }
    text = {"encoder_hidden_states": tokens_BLD.repeat_interleave(frames, dim=0)}

    hidden = unet.conv_in(inputs_BTChw.flatten(0, 1))
    skipped = [hidden]
    for block in unet.down_blocks:
        hidden, kept = block(hidden_states=hidden, **shared, **(text if _attends(block) else {}))
        skipped += kept
    hidden = unet.mid_block(hidden_states=hidden, **shared, **text)

    outputs = []
    for block in unet.up_blocks[: last + 1]:
        count = len(block.resnets)
        kept, skipped = tuple(skipped[-count:]), skipped[:-count]
        # Sizes that halving rounded are restored from the next skipped activation, exactly as where they divide.
        size = skipped[-1].shape[-2:] if skipped else None
        hidden = block(
            hidden_states=hidden, res_hidden_states_tuple=kept, upsample_size=size, **shared,
            **(text if _attends(block) else {}),
        )  # fmt: skip
        outputs.append(hidden.unflatten(0, (clips, frames)))
    return outputs


def _attends(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
