"""Video training step: cached latents against pixels through the VAE: `python -m tests.bench.bench_tvp_step`.

Forward and backward of a reduced model (UNet 64/128/256, VAE 32/64/128/128, 8 frames of 64 pixels, 8 x 8 latents) in
float32, each path with and without activation checkpointing, optimiser and reading left out; the four losses must
agree within 1e-5 before anything is timed, so the cache gives the posterior's mean and the first frame gets no noise.
Then what a batch costs to read, from the cache and from H.264. Rounds are interleaved; medians of the CPU seconds of
all threads are printed, beside the ratio of operations counted on the meta device, which arithmetic alone would give,
and the counted ratio at full size. The VAE weighs more here than there: 1.1 times the UNet's forward pass, not 0.9.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.compute import ComputeConfig, apply_compute
from ingest.windows import ClipSource, WindowRule
from tests.helpers_data import make_episode_dataset
from training import cache_build
from training.cache import CacheConfig
from training.data.video_clips import VideoClipDataset, VideoDataConfig
from training.export_video import save_vae_export
from training.meta_step import step_cost
from training.models.common.text import TextEncoderConfig
from training.models.tvp.autoencoder import random_autoencoder
from training.models.tvp.config import TVPConfig, UNetConfig, VAEConfig
from training.recipes.sources import with_latents
from training.recipes.tvp import FinetuneConfig, svd
from training.recipes.tvp_task import TVPTask

log = logging.getLogger("bench")

SIZE, FRAMES = 64, 8
VAE = VAEConfig(block_out_channels=(32, 64, 128, 128), sample_size=SIZE)
MODEL = TVPConfig(
    unet=UNetConfig(
        block_out_channels=(64, 128, 256),
        num_attention_heads=(2, 4, 8),
        cross_attention_dim=768,
        addition_time_embed_dim=64,
        sample_size=8,
    ),
    vae=VAE,
    text=TextEncoderConfig(),
    num_frames=FRAMES,
    image_size=SIZE,
    decode_chunk=1,
)
FASTEST, SLOWEST = "cached", "pixels, checkpointed"


@dataclass(frozen=True)
class Inputs:
    """A data set, a random autoencoder's export and the cache of both."""

    data: str
    vae: str
    cache: str

    @classmethod
    def make(cls, folder: Path) -> Inputs:
        """Eight episodes of 40 frames."""
        inputs = cls(*(str(folder / name) for name in ("data", "vae", "cache")))
        make_episode_dataset(folder / "data", num_episodes=8, num_frames=40, size=SIZE, layout="video")
        torch.manual_seed(0)
        save_vae_export(inputs.vae, random_autoencoder(VAE), VAE, image_size=SIZE, card="bench", inputs=[])
        made = CacheConfig(data=inputs.data, vae=inputs.vae, output=inputs.cache, image_size=SIZE, workers=0)
        cache_build.run(made)
        return inputs

    def config(self, *, cached: bool) -> FinetuneConfig:
        """The run whose step is timed, reading pixels or the cache."""
        rule = WindowRule(num_frames=FRAMES, stride=4)
        sources: tuple[ClipSource, ...] = (ClipSource(name="squares", url=self.data, rule=rule),)
        if cached:
            sources = with_latents(sources, {self.data: self.cache})
        return FinetuneConfig(
            output="unused",
            model=MODEL,
            vae=self.vae,
            data=VideoDataConfig(sources=sources, image_size=SIZE),
            latents="mode",
            condition_noise=False,
            global_batch_size=8,
            precision="float32",
            compute=ComputeConfig(workers=0),
        )


def steps(inputs: Inputs, batch: int) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """(one forward and backward of each variant on the same weights, clips and draws; their counted operations)."""
    tasks = {"cached": TVPTask(inputs.config(cached=True)), "pixels": TVPTask(inputs.config(cached=False))}
    torch.manual_seed(1)
    model = tasks["pixels"].build_model()
    tasks["pixels"].prepare(model)
    sides: dict[str, Callable[[], float]] = {}
    operations: dict[str, int] = {}
    for path, task in tasks.items():
        clips = VideoClipDataset(task.config.data).__getitems__([(0, 0, clip) for clip in range(batch)])
        for checkpointed in (False, True):
            name = path + (", checkpointed" if checkpointed else "")

            def run(task: TVPTask = task, clips: object = clips, checkpointed: bool = checkpointed) -> float:
                model.checkpoint_activations(checkpointed)
                loss = task.loss(model, clips, torch.device("cpu"))["loss"]
                model.zero_grad()
                loss.backward()
                return float(loss.detach())

            sides[name] = run
            operations[name] = counted(task, checkpointed, batch)
    return sides, operations


def counted(task: TVPTask, checkpointed: bool, batch: int) -> int:
    """Operations of a step, by running it without storage."""
    with torch.device("meta"):
        model = task.build_model().to("meta")
    model.checkpoint_activations(checkpointed)
    return step_cost(task, model, "float32", batch).step_flops


def compare_steps(inputs: Inputs, *, batch: int, rounds: int) -> None:
    """Print a line for each variant."""
    sides, operations = steps(inputs, batch)
    losses = {name: run() for name, run in sides.items()}
    spread = max(losses.values()) - min(losses.values())
    assert spread < 1e-5 * max(1.0, *losses.values()), f"losses differ: {losses}"
    seconds = interleaved(sides, rounds)
    log.info("losses of the four within %.0e of %.4f; batch of %d clips", spread, losses[FASTEST], batch)
    for name, taken in seconds.items():
        log.info(
            *("%-22s %.3f CPU s, ratio %.2f; counted %.1f GFLOP, ratio %.2f", name, statistics.median(taken)),
            *(paired(taken, seconds[FASTEST]), operations[name] / 1e9, operations[name] / operations[FASTEST]),
        )


def compare_reading(inputs: Inputs, *, batch: int, rounds: int) -> None:
    """Print what a batch costs to read, files in the page cache."""
    visits = [(0, 0, clip) for clip in range(batch)]

    def reader(cached: bool) -> Callable[[], object]:
        dataset = VideoClipDataset(inputs.config(cached=cached).data)
        return lambda: dataset.__getitems__(visits)

    readers = {"cache": reader(True), "H.264": reader(False)}
    for read in readers.values():
        read()
    seconds = interleaved(
        {name: lambda read=read: [read() for _ in range(10)] for name, read in readers.items()}, rounds
    )
    per_clip = {name: 1e3 * statistics.median(taken) / 10 / batch for name, taken in seconds.items()}
    log.info(
        "reading a clip: cache %.2f ms, H.264 %.2f ms (ratio %.1f)",
        *(per_clip["cache"], per_clip["H.264"], paired(seconds["H.264"], seconds["cache"])),
    )


def compare_full_size(inputs: Inputs) -> None:
    """Print the counted ratio of the published sizes, bf16."""
    task = svd(initial="", data=inputs.data, output="unused").build_task()
    task.from_cache = True
    cached = counted(task, False, 1)
    task.from_cache = False
    pixels = counted(task, True, 1)
    log.info("full size, counted: %.2f (%.0f and %.0f GFLOP a clip)", pixels / cached, pixels / 1e9, cached / 1e9)


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return seconds


def paired(taken: list[float], reference: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(taken, reference, strict=True))


def main() -> None:
    """Parse and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.make(Path(folder))
        library = apply_compute(ComputeConfig(threads=arguments.threads))
        log.info("load %.1f on %d cores, matmul library %s", os.getloadavg()[0], os.cpu_count() or 1, library)
        compare_steps(inputs, batch=arguments.batch, rounds=arguments.rounds)
        compare_reading(inputs, batch=arguments.batch, rounds=arguments.rounds)
        compare_full_size(inputs)
        log.info("load %.1f at the end", os.getloadavg()[0])


if __name__ == "__main__":
    main()
