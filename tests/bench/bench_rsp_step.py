"""RSP training step against the papers' three-pass step, side by side: `python -m tests.bench.bench_rsp_step`.

The three-pass step is the plain statement of tests/numerics (held to the reference numbers there) with the library's
linear, layer norm and batched products; its losses must equal ours before it is timed. ViT-S/16, 224 pixels, forward
and backward, optimiser left out. Rounds are interleaved; CPU seconds of all threads and medians are printed, for both
matmul libraries of a CPU.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from tests.numerics import rsp_plain
from training.models.rsp import RSP, RSPConfig, RSPDraws

log = logging.getLogger("bench")


def use_library_kernels() -> None:
    """The plain statement's hand-written norm and matrix products would be an unfair opponent."""
    rsp_plain.linear = lambda w, name, x: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    rsp_plain.norm = lambda w, name, x: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    rsp_plain.attend = attend


def steps(config: RSPConfig, batch: int) -> dict[str, Callable[[], dict[str, float]]]:
    """One forward and backward of each side on the same weights, images and draws."""
    torch.manual_seed(0)
    model = RSP(config)
    current, future, noise = torch.randn(3, batch, 3, config.image_size, config.image_size)
    picks = torch.randint(config.num_classes, (2, batch, config.num_latents))
    posterior, prior = F.one_hot(picks, config.num_classes).float()
    mask = torch.rand(batch, config.num_patches)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        weights[name].requires_grad_()

    def plain() -> dict[str, float]:
        losses = rsp_plain.rsp_losses(
            weights, current, future, rsp_plain.PlainDraws(noise, posterior, prior, mask), config
        )
        for value in weights.values():
            value.grad = None
        losses["loss"].backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    def ours() -> dict[str, float]:
        output = model(current, future, RSPDraws(noise, posterior, prior, mask))
        model.zero_grad()
        output.loss.backward()
        return output.metrics()

    return {"plain": plain, "ours": ours}


def compare(precision: str, *, batch: int, rounds: int) -> float:
    """Print one line of medians; returns the ratio of CPU seconds."""
    torch.set_float32_matmul_precision(precision)
    sides = steps(RSPConfig(), batch)
    results = {side: run() for side, run in sides.items()}
    error = max(abs(results["plain"][name] - value) for name, value in results["ours"].items())
    assert error < 1e-5, f"losses differ by {error}"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.process_time()
            run()
            seconds[side].append(time.process_time() - start)
    plain, ours = (statistics.median(seconds[side]) for side in ("plain", "ours"))
    ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
    log.info("%-8s plain %.2f s, ours %.2f s, ratio %.2f; losses within %.0e", precision, plain, ours, ratio, error)
    return ratio


def main() -> None:
    """Parse and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    use_library_kernels()
    for precision in ("highest", "medium"):
        compare(precision, batch=arguments.batch, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
