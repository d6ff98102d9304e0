"""LPIPS (Zhang et al. 2018), version 0.1 with AlexNet, on weights the user gives by path.

Shape letters: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from evaluation.video_quality.weights import fit_weights, read_state_dict

CHANNELS = (64, 192, 384, 256, 256)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
# torchvision's indices of the convolutions in AlexNet's `features`; each is followed by a ReLU, whose output is used.
CONVOLUTIONS = {"0": (3, 64, 11, 4, 2), "3": (64, 192, 5, 1, 2), "6": (192, 384, 3, 1, 1), "8": (384, 256, 3, 1, 1)} | {
    "10": (256, 256, 3, 1, 1)
}
POOLED_BEFORE = ("3", "6")


class AlexNetFeatures(nn.Module):
    """The five convolutions of AlexNet under torchvision's names, e.g. `features.0.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {name: nn.Conv2d(i, o, k, stride=s, padding=p) for name, (i, o, k, s, p) in CONVOLUTIONS.items()}
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, 3, H, W) -> the five activations after ReLU."""
        found = []
        for name, convolution in self.features.items():
            if name in POOLED_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(convolution(x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """Perceptual distance of two pictures; 0 for equal ones, lower is better."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = AlexNetFeatures()
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in CHANNELS])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @torch.no_grad()
    def forward(self, first_NHWC: torch.Tensor, second_NHWC: torch.Tensor) -> torch.Tensor:
        """Two uint8 (N, H, W, 3) batches, sides of at least 31 -> (N,) distances."""
        total = torch.zeros(len(first_NHWC))
        both = zip(self._features(first_NHWC), self._features(second_NHWC), self.heads, strict=True)
        for first, second, head in both:
            total = total + (head * (first - second) ** 2).sum(dim=1).mean(dim=(1, 2))
        return total

    def _features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        x = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        found = self.backbone((x - self.shift) / self.scale)
        return [value / (value.norm(dim=1, keepdim=True) + EPS) for value in found]


def load_lpips(heads: str | Path, backbone: str | Path) -> LPIPS:
    """LPIPS from the linear heads (`lin0.model.1.weight` ...) and torchvision's AlexNet; its classifier is ignored."""
    model = LPIPS()
    weights = read_state_dict(backbone)
    features = {name: value for name, value in weights.items() if name.startswith("features.")}
    fit_weights(model.backbone, features, path=backbone)
    named = {name.replace("lin", "", 1).replace(".model.1.weight", ""): v for name, v in read_state_dict(heads).items()}
    fit_weights(model.heads, named, path=heads)
    return model.eval().requires_grad_(False)
