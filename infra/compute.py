"""How much of the machine a process uses, and which library multiplies its matrices."""

from __future__ import annotations

import logging
import time
from typing import Literal

from pydantic import Field

from infra.config import Config

log = logging.getLogger(__name__)

PROBE_SIDE = 768
PROBE_MAX_ERROR = 1e-6
MatmulLibrary = Literal["auto", "default", "onednn"]


class ComputeConfig(Config):
    """How many processes of what size. Never part of a run's identity: it must not change the result."""

    workers: int = Field(default=2, ge=0, description="training processes; 0 trains in this process without Ray")
    cpus_per_worker: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, ge=1, description="arithmetic threads of one worker")
    loader_workers: int = Field(default=0, ge=0, description="loader processes of one worker; 0 loads in the worker")
    use_gpu: bool = False
    max_failures: int = Field(default=3, ge=-1, description="restarts of the worker group; -1 is unlimited")
    matmul: MatmulLibrary = "auto"


def apply_compute(compute: ComputeConfig, *, matmul: MatmulLibrary | None = None) -> MatmulLibrary:
    """Set threads and the float32 matmul library of this process; returns the library in use.

    `matmul` is the choice of an earlier run that this one continues: two libraries round differently, so a resumed
    run must not probe again.
    """
    import torch

    torch.set_num_threads(compute.threads)
    choice: MatmulLibrary = matmul or compute.matmul
    if choice == "auto":
        choice = "default" if compute.use_gpu else probe_matmul()
    # "medium" only permits lower precision: without such kernels for float32 inputs it selects oneDNN in float32.
    torch.set_float32_matmul_precision("medium" if choice == "onednn" else "highest")
    return choice


def probe_matmul() -> Literal["default", "onednn"]:
    """Which library multiplies float32 matrices faster on this CPU at float32 accuracy.

    One product is timed with both and compared with float64; the switch that permits oneDNN also permits bfloat16
    on processors that have such units, so it is taken only if the error stays below 1e-6. Leaves the setting as found.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(PROBE_SIDE, PROBE_SIDE, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    found = torch.get_float32_matmul_precision()
    seconds, error = {}, 0.0
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            product = left @ right
            seconds[precision] = min(_timed_product(left, right) for _ in range(5))
            error = float((product.double() - exact).norm() / exact.norm())
    finally:
        torch.set_float32_matmul_precision(found)
    faster = seconds["medium"] < 0.9 * seconds["highest"]
    choice: Literal["default", "onednn"] = "onednn" if faster and error < PROBE_MAX_ERROR else "default"
    log.info(
        "float32 matmul: %s (default %.2f ms, oneDNN %.2f ms, relative error %.1e)",
        *(choice, 1e3 * seconds["highest"], 1e3 * seconds["medium"], error),
    )
    return choice


def _timed_product(left: object, right: object) -> float:
    import torch

    started = time.perf_counter()
    torch.matmul(left, right)
    return time.perf_counter() - started
