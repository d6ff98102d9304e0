"""Label propagation against a straightforward loop, side by side: `python tests/bench/bench_label_propagation.py`.

The loop computes every frame's full affinity to every context, as the published evaluations do, and must reproduce the
reference numbers before it is timed. Rounds are interleaved; CPU seconds (all threads) and medians are printed, set-up
(the loop's window mask) is left out of the loop's time and included in ours.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from evaluation.label_propagation import PropagationConfig, propagate

ASSETS = Path(__file__).parents[1] / "assets"
CASES = {
    "radius 12, queue 7": PropagationConfig(top_k=5, radius=12, queue=7, temperature=0.1),
    "radius 30, queue 30": PropagationConfig(top_k=7, radius=30, queue=30, temperature=0.1),
}
LIBRARIES = {"default": "highest", "oneDNN": "medium"}  # what the switch selects where no lower precision exists
log = logging.getLogger("bench")


def window_mask(height: int, width: int, radius: float) -> torch.Tensor:
    """(HW, HW) 0/1 square window."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    return near.float()


def plain_loop(
    features_THWD: torch.Tensor, labels_HWC: torch.Tensor, config: PropagationConfig, mask: torch.Tensor
) -> torch.Tensor:
    """Steps 5 to 8 of the DINO-style protocol, one full affinity a frame."""
    num_frames, height, width, depth = features_THWD.shape
    first = features_THWD[0].reshape(-1, depth).T, labels_HWC.reshape(height * width, -1).T
    latest: list[tuple[torch.Tensor, torch.Tensor]] = []
    result = []
    for frame in range(1, num_frames):
        contexts = [first, *latest]
        keys_NDP = torch.nn.functional.normalize(torch.stack([features for features, _ in contexts]), dim=1)
        queries_PD = torch.nn.functional.normalize(features_THWD[frame].reshape(-1, depth), dim=1)
        affinity = torch.exp(torch.bmm(queries_PD.expand(len(contexts), -1, -1), keys_NDP) / config.temperature)
        affinity = (affinity * mask).transpose(2, 1).reshape(-1, height * width)
        smallest_kept = torch.topk(affinity, config.top_k, dim=0).values.amin(dim=0)
        affinity[affinity < smallest_kept] = 0
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        soft_CP = torch.cat([labels for _, labels in contexts], dim=1) @ affinity
        result.append(soft_CP.T.reshape(height, width, -1))
        latest = [*latest, (features_THWD[frame].reshape(-1, depth).T, soft_CP)][-config.queue :]
    return torch.stack(result)


def golden_error() -> tuple[float, float]:
    """Largest soft-label error of (the plain loop, ours) against the reference numbers."""
    with np.load(ASSETS / "label_propagation_reference.npz", allow_pickle=False) as stored:
        top_k, radius, queue, temperature = stored["davis_style/case0/config_topk_radius_queue_temp"]
        config = PropagationConfig(top_k=int(top_k), radius=radius, queue=int(queue), temperature=temperature)
        features = torch.from_numpy(stored["feats"])
        labels = torch.eye(3)[torch.from_numpy(stored["first_labels"]).long()]
        truth = torch.from_numpy(stored["davis_style/case0/soft"]).permute(0, 2, 3, 1)
    mask = window_mask(*features.shape[1:3], config.radius)
    plain, ours = plain_loop(features, labels, config, mask), propagate(features, labels, config)
    return float((plain - truth).abs().max()), float((ours - truth).abs().max())


def smooth_video(num_frames: int, height: int, width: int, depth: int) -> torch.Tensor:
    """Random features that vary slowly in space and time, as a video's do, so that the k best are near one another."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, depth, max(2, num_frames // 8), 8, 12, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(num_frames, height, width), mode="trilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return (smooth + 0.1 * noise)[0].permute(1, 2, 3, 0).contiguous()


def compare(name: str, config: PropagationConfig, *, num_frames: int, rounds: int) -> None:
    """Print medians of CPU seconds and the ratios with the default and with the faster matmul library."""
    features = smooth_video(num_frames, 30, 52, 384)
    labels = torch.eye(4)[torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(1))]
    labels = labels.repeat_interleave(10, 0).repeat_interleave(13, 1)
    mask = window_mask(30, 52, config.radius)
    runs = {
        "plain": lambda: plain_loop(features, labels, config, mask),
        "ours": lambda: propagate(features, labels, config),
    }
    milliseconds: dict[tuple[str, str], list[float]] = {}
    results = {}
    for _ in range(rounds):
        for library, side in itertools.product(LIBRARIES, runs):
            torch.set_float32_matmul_precision(LIBRARIES[library])
            start = time.process_time()
            results[side, library] = runs[side]()
            elapsed = 1000 * (time.process_time() - start) / (num_frames - 1)
            milliseconds.setdefault((side, library), []).append(elapsed)
    medians = {key: statistics.median(values) for key, values in milliseconds.items()}
    log.info("%s, %d frames, CPU milliseconds a frame:", name, num_frames)
    for (side, library), median in medians.items():
        error = (results[side, library] - results["plain", "default"]).abs().amax(dim=-1)
        log.info(
            "  %-5s %-7s %7.1f  ratio to plain: same library %5.2f, default library %5.2f; cells off by > 1e-5: %.1e",
            *(side, library, median, medians["plain", library] / median, medians["plain", "default"] / median),
            float((error > 1e-5).float().mean()),
        )


def peak_mib() -> float:
    """Peak resident size of this process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def memory_above_inputs(config_name: str, num_frames: int) -> float:
    """MiB of peak resident size above the size just before the call, in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", config_name, "--frames", str(num_frames)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Parse, check against the reference numbers, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--memory-of", choices=CASES, default="")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.memory_of:
        features = smooth_video(arguments.frames, 30, 52, 384)
        labels = torch.eye(4)[torch.zeros(30, 52, dtype=torch.long)]
        propagate(features[:2], labels, CASES[arguments.memory_of])
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of making the features
        before = peak_mib()
        propagate(features, labels, CASES[arguments.memory_of])
        print(peak_mib() - before)
        return
    plain_error, our_error = golden_error()
    log.info("against the reference numbers: plain loop %.1e, ours %.1e", plain_error, our_error)
    if max(plain_error, our_error) > 1e-5:
        raise SystemExit("a side does not reproduce the reference numbers")
    log.info("%d threads, medians of %d interleaved rounds", torch.get_num_threads(), arguments.rounds)
    for name in arguments.case or CASES:
        compare(name, CASES[name], num_frames=arguments.frames, rounds=arguments.rounds)
        log.info("%s: peak memory above features: %.0f MiB", name, memory_above_inputs(name, arguments.frames))


if __name__ == "__main__":
    main()
