"""One local Ray for the whole session: starting it costs ten seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from infra.ray_runtime import connect

LOGICAL_CPUS = 4


@pytest.fixture(scope="session")
def ray_cluster(moto_endpoint: str) -> Iterator[str]:
    """Address of a Ray on loopback, without authentication, that this process has joined.

    The S3 endpoint is up first, so that workers inherit its address.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        with connect(LOGICAL_CPUS):
            import ray

            yield ray.get_runtime_context().gcs_address
