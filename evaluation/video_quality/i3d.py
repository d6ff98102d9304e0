"""I3D (Carreira and Zisserman 2017), the Kinetics-400 network whose logits FVD is measured on.

Written from the paper's table of layers under the parameter names of the published PyTorch weights, which the user
gives by path. Shape letters: B clips, C colours, T frames, H height, W width.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from evaluation.video_quality.weights import fit_weights, read_state_dict
from infra.errors import InputError

NUM_CLASSES = 400
SIDE = 224
MIN_FRAMES = 9  # three halvings must leave the two frames that the last pooling joins
# Widths of an Inception block: 1x1; 1x1 then 3x3; 1x1 then 3x3; pooling then 1x1.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
Triple = tuple[int, int, int]


class Unit3D(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm and ReLU; the last layer has a bias instead of both."""

    def __init__(self, width: int, out: int, kernel: Triple, stride: Triple = (1, 1, 1), *, last: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(width, out, kernel, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(out, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, out, ceil(T / stride), ...)."""
        x = self.conv3d(_pad_same(x, self.kernel, self.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class InceptionBlock(nn.Module):
    """Four branches over the same input, joined on channels."""

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        one, three = (1, 1, 1), (3, 3, 3)
        self.b0 = Unit3D(width, sizes[0], one)
        self.b1a, self.b1b = Unit3D(width, sizes[1], one), Unit3D(sizes[1], sizes[2], three)
        self.b2a, self.b2b = Unit3D(width, sizes[3], one), Unit3D(sizes[3], sizes[4], three)
        self.b3b = Unit3D(width, sizes[5], one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, T, H, W) -> (B, sum of the branches' widths, T, H, W)."""
        pooled = _pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class InceptionI3d(nn.Module):
    """The RGB stream. Dropout is left out: this network is only ever evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64, (1, 1, 1))
        self.Conv3d_2c_3x3 = Unit3D(64, 192, (3, 3, 3))
        for name, (width, sizes) in MIXED.items():
            self.add_module(name, InceptionBlock(width, sizes))
        self.logits = Unit3D(1024, NUM_CLASSES, (1, 1, 1), last=True)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, 224, 224) in [-1, 1], T >= 9 -> (B, 400) logits, averaged over time."""
        if clips.shape[2] < MIN_FRAMES:
            raise InputError(
                f"I3D needs clips of at least {MIN_FRAMES} frames, these count {clips.shape[2]}.",
                remedy="Leave i3d_weights empty for such short clips.",
            )
        x = _pool_same(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = _pool_same(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == "Mixed_4b":
                x = _pool_same(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = _pool_same(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
        return self.logits(x).mean(dim=(2, 3, 4))


def load_i3d(path: str | Path) -> InceptionI3d:
    """The network with the user's weights; `InputError` when the file is missing, a program, or of another network."""
    with torch.device("meta"):
        shape = InceptionI3d()
    model = shape.to_empty(device="cpu")
    for name, value in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.zero_()
    fit_weights(model, read_state_dict(path), path=path)
    return model


def preprocess(clips_BTHWC: torch.Tensor) -> torch.Tensor:
    """uint8 clips -> (B, 3, T, 224, 224) in [-1, 1]: shorter side to 224 (bilinear, no antialias), centre crop."""
    batch, frames, height, width, _ = clips_BTHWC.shape
    pictures = clips_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).float() / 255.0
    scale = SIDE / min(height, width)
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    pictures = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    pictures = pictures[..., top : top + SIDE, left : left + SIDE] * 2.0 - 1.0
    return pictures.unflatten(0, (batch, frames)).transpose(1, 2)


def _pool_same(x: torch.Tensor, kernel: Triple, stride: Triple) -> torch.Tensor:
    # Padding with zeros, not minus infinity: the inputs are outputs of a ReLU.
    return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)


def _pad_same(x: torch.Tensor, kernel: Triple, stride: Triple) -> torch.Tensor:
    """Zeros so that ceil(size / stride) outputs remain; an odd one goes behind."""
    padding: list[int] = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        missing = max(k - (size % s or s), 0)
        padding += [missing // 2, missing - missing // 2]
    return F.pad(x, padding)
