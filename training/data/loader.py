"""Batches by training step: the same bytes for any number of loader workers and, put together, of ranks.

Where training stands in its data is (data set version, seed, step); `step_loader` starts at any step at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler

from infra.errors import ConfigError
from ingest.order import Indices, rank_span

PREFETCHED_BATCHES = 2
ENDLESS = 2**62
WORKER_TIMEOUT_S = 300.0  # a worker that hangs on a disk stops the run instead of freezing it


class Order(Protocol):
    """What stands at every position: a `SampleOrder`, or a mixture of several."""

    def slice(self, start: int, stop: int) -> tuple[Indices, ...]:
        """The columns of the visits at positions [start, stop): (epoch, clip), or (source, epoch, clip)."""
        ...


class StepSampler(Sampler[list[tuple[int, ...]]]):
    """For every step in [start_step, stop_step), this rank's visits."""

    def __init__(
        self,
        order: Order,
        *,
        global_batch_size: int,
        start_step: int,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        stop_step = ENDLESS if stop_step is None else stop_step
        if not 0 <= start_step <= stop_step:
            raise ConfigError(f"steps [{start_step}, {stop_step}) are not a range.")
        rank_span(start_step, global_batch_size, rank, world_size)  # refuses sizes that do not divide, before any work
        self.order = order
        self.global_batch_size = global_batch_size
        self.steps = range(start_step, stop_step)
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for step in self.steps:
            span = rank_span(step, self.global_batch_size, self.rank, self.world_size)
            yield list(zip(*(column.tolist() for column in self.order.slice(*span)), strict=True))


def step_loader(
    dataset: Dataset[Any],
    order: Order,
    *,
    global_batch_size: int,
    start_step: int = 0,
    stop_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """An iterable of this rank's batch for every step in [start_step, stop_step), without end by default.

    `dataset` takes a list of the order's visits in `__getitems__` and returns the finished batch.
    """
    sampler = StepSampler(
        order,
        global_batch_size=global_batch_size,
        start_step=start_step,
        stop_step=stop_step,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_finished,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        pin_memory=pin_memory,
    )


def _finished(batch: Any) -> Any:
    return batch
