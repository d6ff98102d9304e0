"""Starting, joining and leaving Ray, and what every heavy process sets before it imports anything large.

`prepare_environment` comes first in each entry point: Ray reads its authentication mode when it is imported, and an
unset mode makes a local start write a token file that later changes how every other command on the machine behaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.errors import ServiceError
from infra.settings import QUIET_ENVIRONMENT, settings

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 300 << 20  # no pixels travel through the object store
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


def prepare_environment() -> None:
    """Set the quiet defaults and an explicit `RAY_AUTH_MODE`; what the user has set wins. Call before `import ray`."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = _auth_mode()
        if "ray" in sys.modules:
            log.warning("ray was imported before its authentication mode was set; a local start may be refused")


def cluster_address() -> str:
    """Address of the cluster to join, "" for none: `RAY_ADDRESS` (set inside a Ray job), else the settings."""
    return os.environ.get("RAY_ADDRESS", "") or settings().ray_address


def worker_environment(compute: ComputeConfig) -> dict[str, str]:
    """Environment of the processes Ray starts for us: our quiet defaults, and threads that do not oversubscribe."""
    passed = {name: os.environ[name] for name in QUIET_ENVIRONMENT if name in os.environ}
    passed |= {name: value for name, value in os.environ.items() if name.startswith("FOREFRAME_")}
    # Workers have another working folder, so a relative home would be another place.
    passed["FOREFRAME_HOME"] = settings().home_url
    threads = str(compute.threads)
    return passed | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


@contextlib.contextmanager
def connect(num_cpus: int) -> Iterator[None]:
    """Ray for the length of the block: the running one, the configured cluster, or a small local one that ends with it.

    `num_cpus` are logical CPUs of a local start and are ignored when joining.
    """
    prepare_environment()
    address = cluster_address()
    if not address:
        # Read at import. Without it a local Ray listens on the machine's outer address, here without authentication.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    started = time.monotonic()
    try:
        _join(address) if address else _start_local(num_cpus)
        log.info("ray is up: %s (%.1f s)", address or "local", time.monotonic() - started)
        yield
    finally:
        ray.shutdown()


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


def _auth_mode() -> str:
    """`token` where a token is configured, or where we join a cluster and a token file waits for it."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return "token"
    token_file = Path.home() / ".ray" / "auth_token"
    return "token" if cluster_address() and token_file.is_file() else "disabled"


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ServiceError(
            f"cannot join the Ray cluster at {address}: {error}.",
            remedy="Is it running with the same RAY_AUTH_MODE? Unset RAY_ADDRESS to start a local one.",
        ) from error


def _start_local(num_cpus: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
