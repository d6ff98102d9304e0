"""One control decision of the Video Prediction Policy: `python -m tests.bench.bench_vpp_step`.

Three lines. The action head at full size, ten steps, one observation: the release's sampler (the plain statement of
tests/numerics/vpp_plain.py, which reproduces the reference numbers and encodes the context at every step) against
ours. The Video-Former at full width. And a whole decision on two views at a reduced UNet (64/128/256/256), full-width
former and head: diffusers' own UNet and the plain statements against ours. The outputs must agree within 1e-4 before
anything is timed, building the models is left out, rounds are interleaved, and medians of the CPU seconds of all
threads are printed. "Floor" is our counted arithmetic at the measured rate of one large matrix product.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.compute import ComputeConfig, apply_compute
from tests.bench.bench_tvp_step import interleaved, paired
from tests.helpers_tvp import untouched_unet
from tests.numerics import vpp_plain as plain
from training.models.tvp import TextGuidedVideoModel, TVPConfig, UNetConfig, VAEConfig
from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.sampler import noise_levels

log = logging.getLogger("bench")

TOLERANCE = 1e-4
SIZES = {"encoder_layers": 4, "decoder_layers": 4, "heads": 8}
VIDEO = TVPConfig(
    unet=UNetConfig(
        block_out_channels=(64, 128, 256, 256),
        num_attention_heads=(2, 4, 8, 8),
        cross_attention_dim=1024,
        addition_time_embed_dim=64,
        sample_size=32,
    ),
    vae=VAEConfig(block_out_channels=(32, 64, 64, 64)),
)
LAYERS, VIEWS = (0, 1), 2
Side = Callable[[], torch.Tensor]


class Head:
    """Released sizes with random weights: both samplers on one draw."""

    def __init__(self) -> None:
        self.model = randomised(ActionDenoiser(ActionDenoiserConfig()))
        self.weights = dict(self.model.state_dict())
        self.goal, self.unit_noise = torch.randn(1, 1, 512), torch.randn(1, 10, 7)
        self.sigmas = noise_levels(SamplingConfig())

    def ours(self, tokens: torch.Tensor) -> torch.Tensor:
        """The package's sampler."""
        return self.model.sample(tokens, self.goal, unit_noise=self.unit_noise, sigmas=self.sigmas)

    def plain(self, tokens: torch.Tensor) -> torch.Tensor:
        """As released: the whole network at every step."""

        def denoise(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
            return plain.denoised(self.weights, tokens, self.goal, noisy, torch.full((1,), sigma), **SIZES)

        return plain.ddim(denoise, self.unit_noise * 80, self.sigmas.tolist())[0]


class Former:
    """Released width and depth on features of the reduced UNet."""

    def __init__(self, channels: int) -> None:
        self.model = randomised(VideoFormer(VideoFormerConfig(condition_dim=channels)))
        self.weights = dict(self.model.state_dict())

    def ours(self, features_BTNC: torch.Tensor) -> torch.Tensor:
        """The package's former."""
        return self.model(features_BTNC)

    def plain(self, features_BTNC: torch.Tensor) -> torch.Tensor:
        """Each layer normalises and projects the media anew."""
        return plain.video_former(self.weights, features_BTNC, depth=6, heads=8)


class Tap:
    """Features of the reduced video model on one draw of noise."""

    def __init__(self) -> None:
        self.model = randomised(TextGuidedVideoModel.random(VIDEO))
        self.unet = untouched_unet(self.model, VIDEO).eval()
        self.views, self.text = torch.rand(VIEWS, 3, 256, 256) * 2 - 1, torch.randn(1, 20, 1024)
        self.noise = torch.randn(VIEWS, VIDEO.num_frames, 4, 32, 32)

    def ours(self) -> torch.Tensor:
        """(1, T, N, C), the views' tokens one behind the other."""
        text = self.text.expand(VIEWS, -1, -1)
        maps_VTCHW = self.model.extract_features(self.views, text, unit_noise=self.noise, layers=LAYERS)
        return torch.cat(list(maps_VTCHW.flatten(3).transpose(2, 3)), dim=1)[None]

    def plain(self) -> torch.Tensor:
        """diffusers' UNet up to the tapped block: text is projected once per frame and per pixel."""
        ours, self.model.unet = self.model.unet, self.unet
        try:
            return self.ours()
        finally:
            self.model.unet = ours


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights off their start, so that gates and norms count."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim <= 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval().requires_grad_(False)


def compare(name: str, sides: dict[str, Side], *, rounds: int, rate: float) -> None:
    """Print the medians of both sides, their ratio and the floor of ours."""
    answers = {side: run() for side, run in sides.items()}
    difference = float((answers["ours"] - answers["plain"]).abs().max())
    scale = max(1.0, float(answers["plain"].abs().max()))
    assert difference <= TOLERANCE * scale, f"{name}: outputs differ by {difference}"
    operations = {side: counted(run) for side, run in sides.items()}
    seconds = interleaved(sides, rounds)
    floor = operations["ours"] / rate
    log.info(
        "%-16s plain %.3f, ours %.3f CPU s, ratio %.2f; difference %.0e; counted %.1f and %.1f GFLOP, our floor %.3f s",
        *(name, statistics.median(seconds["plain"]), statistics.median(seconds["ours"])),
        *(paired(seconds["plain"], seconds["ours"]), difference),
        *(operations["plain"] / 1e9, operations["ours"] / 1e9, floor),
    )


def counted(run: Side) -> int:
    """Operations of the products in one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matmul_rate(size: int = 2048, repeats: int = 7) -> float:
    """Operations per CPU second of one large product: the median."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        left @ right
        taken.append(time.process_time() - start)
    return 2 * size**3 / statistics.median(taken)


@torch.no_grad()
def main() -> None:
    """Parse and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--whole-rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--matmul", choices=("default", "auto"), default="default")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    library = apply_compute(ComputeConfig(threads=arguments.threads, matmul=arguments.matmul))
    log.info("load %.1f on %d cores, matmul library %s", os.getloadavg()[0], os.cpu_count() or 1, library)
    rate = matmul_rate()
    log.info("one product of 2048: %.0f GFLOP per CPU second", rate / 1e9)
    head, tap = Head(), Tap()
    features = tap.ours()
    former = Former(features.shape[-1])
    tokens = former.ours(features)

    def measure(name: str, plain_side: Side, our_side: Side, rounds: int) -> None:
        compare(name, {"plain": plain_side, "ours": our_side}, rounds=rounds, rate=rate)

    measure("head, ten steps", lambda: head.plain(tokens), lambda: head.ours(tokens), arguments.rounds)
    measure("Video-Former", lambda: former.plain(features), lambda: former.ours(features), arguments.rounds)
    measure(
        "whole decision",
        lambda: head.plain(former.plain(tap.plain())),
        lambda: head.ours(former.ours(tap.ours())),
        arguments.whole_rounds,
    )
    log.info("load %.1f at the end", os.getloadavg()[0])


if __name__ == "__main__":
    main()
