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

from infra.compute import ComputeConfig, MatmulLibrary, probe_matmul
from infra.errors import ServiceError
from infra.settings import QUIET_ENVIRONMENT, settings

__all__ = [
    "ComputeConfig",
    "MatmulLibrary",
    "cluster_address",
    "connect",
    "prepare_environment",
    "probe_matmul",
    "worker_environment",
]

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 300 << 20  # no pixels travel through the object store


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
