"""Spawned worker processes for simulators: one renderer each, results in order of completion."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

from infra.errors import MachineError
from infra.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
# Workers share the cores among themselves: a thread pool in each of them only costs.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerPool:
    """Calls a module-level function on many tasks; one worker means: here, without another process.

    Spawned, not forked: a renderer, a thread pool or a Ray client does not survive a fork.
    """

    def __init__(self, workers: int) -> None:
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results as they come. The first error is raised; a worker that died is a `MachineError`."""
        if self._executor is None:
            yield from map(function, tasks)
            return
        with _environment(ONE_THREAD):
            futures = [self._executor.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise MachineError(
                "a simulator process died (killed for memory, or crashed in the OpenGL driver).",
                remedy="Run again: finished work is kept. Use workers=1 to see the process's own message.",
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that the processes started inside the block inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
