"""An exact saving: temporal attention reads a clip's text once instead of once for every pixel of its latents.

diffusers repeats the text for each of the h w rows of a clip and computes keys and values of every copy. All rows of a
clip may share one: attention treats queries one by one. Shape letters: B clips, R = B h w rows, T frames, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OneTextPerClip:
    """diffusers' own attention processor, given R rows of queries (R, T, C) and B texts (B, L, D)."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R, T, C). The inner processor takes the rows of a clip for one long sequence of queries."""
        answers: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return answers.view(hidden_states.shape)


def share_text(unet: nn.Module) -> None:
    """Make the temporal blocks of a UNet share text within a clip; a second call changes nothing."""
    for module in unet.modules():
        for block in getattr(module, "temporal_transformer_blocks", ()):
            if not isinstance(block.attn2.processor, OneTextPerClip):
                block.attn2.set_processor(OneTextPerClip(block.attn2.processor))
                block.register_forward_pre_hook(_keep_one_text, with_kwargs=True)


def _keep_one_text(
    _block: nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """From (R, L, D) equal copies within a clip to (B, L, D); the block's input is (B T, h w, C)."""
    copies = options["encoder_hidden_states"]
    # A copy, so that autograd keeps B texts and not the storage of all of them.
    return inputs, {**options, "encoder_hidden_states": copies[:: inputs[0].shape[1]].clone()}
