"""Shards over a Ray cluster with Ray Data: one row is one shard, what comes back is its receipt.

No pixel passes the object store. A worker that dies is replaced by Ray, without end; the shard's next attempt sees
the mark of the dead one, isolates the video it names, and gives up after a few.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from infra.errors import ServiceError
from infra.ray_data import from_row, quiet_driver, to_row
from infra.ray_runtime import connect
from ingest.build import build_shard
from ingest.plan import PlannedShard
from ingest.recipe import IngestConfig
from ingest.schema import Receipt

log = logging.getLogger(__name__)


def build_on_ray(shards: list[PlannedShard], config: IngestConfig, *, plan_id: str, run_id: str) -> Iterator[Receipt]:
    """Receipts in the order in which the shards finish."""
    with connect(config.workers or os.cpu_count() or 1):
        import ray
        import ray.data
        from ray.exceptions import RayError

        quiet_driver()
        workers = config.workers or int(ray.cluster_resources().get("CPU", 1))
        rows = [{"shard": json.dumps(shard.to_json())} for shard in shards]
        built = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            build_row,
            fn_kwargs={"config": config.to_json(), "plan_id": plan_id, "run_id": run_id},
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=max(1, min(workers, len(rows)))),
        )
        try:
            for row in built.iter_rows():
                yield Receipt.parse(from_row(row))
        except RayError as error:
            raise ServiceError(
                f"building shards on Ray failed: {str(error).strip().splitlines()[-1]}.",
                remedy="Run again: committed shards stay, and what the dead worker was decoding is isolated.",
            ) from error


def build_row(row: dict[str, Any], *, config: dict[str, Any], plan_id: str, run_id: str) -> dict[str, str]:
    """What a worker does with one row."""
    import ray

    logging.basicConfig(level=logging.INFO)

    def work() -> dict[str, Any]:
        planned = PlannedShard.parse(json.loads(row["shard"]))
        node = ray.get_runtime_context().get_node_id()
        return build_shard(planned, IngestConfig.parse(config), plan_id=plan_id, run_id=run_id, node=node).to_json()

    return to_row(work)
