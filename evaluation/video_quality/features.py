"""Named features of clips, between whose distributions set scores are distances.

"random-conv3d-v1" is a small convolution network whose weights are a function of a counter, so that it is the same
everywhere and needs no download; "encoder:URL" joins an exported encoder's class tokens; "i3d" is the published FVD
network on weights the user gives. Shape letters: B clips, T frames, H height, W width, D width of the feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from evaluation.video_quality.config import ENCODER_PREFIX, RANDOM_CONV3D
from evaluation.video_quality.i3d import load_i3d, preprocess
from evaluation.video_quality.metrics import Clip
from infra.digests import sha256_bytes, sha256_file, short
from training.export import load_encoder
from training.protocols import Encoder

I3D_BATCH = 16
RANDOM_SIDE = 64
# (kernel over T, H, W; stride; width in, width out) of the random network.
RANDOM_LAYERS = (
    ((3, 5, 5), (1, 2, 2), 3, 16),
    ((3, 3, 3), (1, 2, 2), 16, 32),
    ((3, 3, 3), (1, 2, 2), 32, 64),
)
RANDOM_KEY = 20_250_101  # of the counter-based generator; a change is another feature and another name


class FeatureExtractor(Protocol):
    """`frechet_name` and `kernel_name` are what the scores are called; `digest` is of the weights."""

    frechet_name: str
    kernel_name: str
    digest: str

    def features(self, clips_BTHWC: Clip) -> npt.NDArray[np.float32]:
        """uint8 clips -> (B, D). A clip's feature does not depend on the others."""
        ...


class RandomConv3d:
    """Three random convolutions over space and time; the feature is each layer's mean and deviation per channel.

    Width 224. Weights are uniform with He's variance from raw Philox words, no biases. Movement is seen because every
    kernel spans three frames.
    """

    def __init__(self) -> None:
        self.frechet_name, self.kernel_name = f"frechet/{RANDOM_CONV3D}", f"kernel/{RANDOM_CONV3D}"
        self._weights = random_weights()
        self.digest = sha256_bytes(b"".join(weight.numpy().tobytes() for weight in self._weights))

    @torch.no_grad()
    def features(self, clips_BTHWC: Clip) -> npt.NDArray[np.float32]:
        """uint8 clips -> (B, 224); pictures are resized to 64 x 64 first."""
        return np.concatenate([self._feature(clip) for clip in clips_BTHWC])

    def _feature(self, clip: Clip) -> npt.NDArray[np.float32]:
        pictures = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pictures = F.interpolate(pictures, size=(RANDOM_SIDE, RANDOM_SIDE), mode="bilinear", align_corners=False)
        x = pictures.transpose(0, 1)[None]
        found = []
        for weight, (kernel, stride, _, _) in zip(self._weights, RANDOM_LAYERS, strict=True):
            x = F.relu(F.conv3d(x, weight, stride=stride, padding=tuple(size // 2 for size in kernel)))
            found += [x.mean(dim=(2, 3, 4)), x.std(dim=(2, 3, 4))]
        return torch.cat(found, dim=1).numpy()


class EncoderFeatures:
    """Class tokens of an exported encoder: their mean over time beside the mean size of their change a frame."""

    def __init__(self, encoder: Encoder) -> None:
        name = f"{ENCODER_PREFIX}{short(encoder.digest)}"
        self.frechet_name, self.kernel_name = f"frechet/{name}", f"kernel/{name}"
        self.digest = encoder.digest
        self._encoder = encoder

    @torch.no_grad()
    def features(self, clips_BTHWC: Clip) -> npt.NDArray[np.float32]:
        """uint8 clips of at least 2 frames -> (B, 2 * width of the encoder)."""
        rows = []
        for clip in clips_BTHWC:
            tokens = self._encoder.encode(self._encoder.preprocess(clip))[:, 0].float().cpu()
            rows.append(torch.cat([tokens.mean(dim=0), tokens.diff(dim=0).abs().mean(dim=0)]))
        return torch.stack(rows).numpy()


class I3DFeatures:
    """Kinetics-400 logits by Seer's protocol: what alone may be called FVD and KVD."""

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        self.frechet_name, self.kernel_name = "FVD", "KVD"
        self._model = load_i3d(path).to(device)
        self._device = device
        self.digest = sha256_file(Path(path))

    @torch.no_grad()
    def features(self, clips_BTHWC: Clip) -> npt.NDArray[np.float32]:
        """uint8 clips of at least 9 frames -> (B, 400), 16 clips at a time."""
        parts = torch.from_numpy(np.ascontiguousarray(clips_BTHWC)).split(I3D_BATCH)
        return torch.cat([self._model(preprocess(part.to(self._device))).cpu() for part in parts]).numpy()


def build_features(names: Sequence[str], *, i3d_weights: str = "", device: str = "cpu") -> list[FeatureExtractor]:
    """The extractors of a config; `InputError` for an encoder or weights that cannot be read."""
    found: list[FeatureExtractor] = []
    for name in names:
        if name == RANDOM_CONV3D:
            found.append(RandomConv3d())
        else:
            found.append(EncoderFeatures(load_encoder(name.removeprefix(ENCODER_PREFIX)).to(device)))
    return [*found, I3DFeatures(i3d_weights, device=device)] if i3d_weights else found


@lru_cache(maxsize=1)
def random_weights() -> list[torch.Tensor]:
    """Weights (out, in, kT, kH, kW) of the random network, equal on every machine."""
    words = np.random.Philox(key=RANDOM_KEY)
    weights = []
    for kernel, _, width, out in RANDOM_LAYERS:
        fan_in = width * int(np.prod(kernel))
        unit = (words.random_raw(out * fan_in) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        values = (2.0 * unit - 1.0) * np.sqrt(6.0 / fan_in)
        weights.append(torch.from_numpy(values.astype(np.float32).reshape(out, width, *kernel)))
    return weights
