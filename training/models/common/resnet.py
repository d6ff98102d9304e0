"""ResNet-18 for control, end to end from pixels: group norm instead of batch norm, spatial softmax instead of a mean.

Sources: Diffusion Policy (Chi 2023), whose vision encoder is robomimic's (Mandlekar 2021). Weight names are
torchvision's. Shape letters: N pictures, C channels, H height, W width, K keypoints, D feature width.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from infra.config import Config


class ResNetConfig(Config):
    """Sizes; the defaults are the published ones. Stage i has `width` x 2^i channels; stages after the first halve."""

    width: int = Field(default=64, ge=4)
    blocks: tuple[int, ...] = Field(default=(2, 2, 2, 2), min_length=1)
    group_channels: int = Field(default=16, ge=1, description="channels of one group of a norm")
    keypoints: int = Field(default=32, ge=1)
    feature_dim: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.width % self.group_channels:
            raise ValueError(f"width {self.width} does not divide by group_channels {self.group_channels}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.blocks)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a skip."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, group_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(outputs // group_channels, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.GroupNorm(outputs // group_channels, outputs)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                nn.GroupNorm(outputs // group_channels, outputs),
            )

    def forward(self, maps_NCHW: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        skipped = maps_NCHW if self.downsample is None else self.downsample(maps_NCHW)
        hidden = torch.relu(self.bn1(self.conv1(maps_NCHW)))
        return torch.relu(self.bn2(self.conv2(hidden)) + skipped)


class ResNetEncoder(nn.Module):
    """Pictures (N, C, H, W) in [-1, 1] -> (N, feature_dim): where K learned maps are high, through a linear layer."""

    def __init__(self, config: ResNetConfig, *, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        group = config.group_channels
        self.conv1 = nn.Conv2d(in_channels, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.GroupNorm(config.width // group, config.width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = config.width
        for stage, (outputs, count) in enumerate(zip(config.widths, config.blocks, strict=True), start=1):
            strides = (1 if stage == 1 else 2, *[1] * (count - 1))
            blocks = [
                BasicBlock(inputs if place == 0 else outputs, outputs, stride=stride, group_channels=group)
                for place, stride in enumerate(strides)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.keypoints = nn.Conv2d(inputs, config.keypoints, 1)
        self.project = nn.Linear(2 * config.keypoints, config.feature_dim)

    def maps(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """The last stage's maps."""
        maps = self.maxpool(torch.relu(self.bn1(self.conv1(images_NCHW))))
        for stage in range(1, len(self.config.blocks) + 1):
            maps = self.get_submodule(f"layer{stage}")(maps)
        return maps

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.project(spatial_softmax(self.keypoints(self.maps(images_NCHW))).flatten(1))


def spatial_softmax(maps_NKHW: torch.Tensor) -> torch.Tensor:
    """The expected place (N, K, 2) of every map under its softmax: column, then row, each from -1 to 1."""
    height, width = maps_NKHW.shape[-2:]
    weights = maps_NKHW.float().flatten(2).softmax(dim=-1).unflatten(2, (height, width))
    rows, columns = (torch.linspace(-1, 1, side, device=maps_NKHW.device) for side in (height, width))
    return torch.stack([(weights.sum(dim=2) * columns).sum(dim=-1), (weights.sum(dim=3) * rows).sum(dim=-1)], dim=-1)
