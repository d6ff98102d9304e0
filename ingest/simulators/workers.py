"""Spawned processes for simulators, one renderer each: a pool for many tasks, and objects that live elsewhere."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from infra.errors import ForeframeError, MachineError
from infra.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
# Workers share the cores among themselves: a thread pool in each of them only costs.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CLOSE_TIMEOUT_S = 10.0


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


class Closable(Protocol):
    """What can live in a host."""

    def close(self) -> None:
        """Give back what the operating system lent."""
        ...


class Host(Protocol):
    """Where an object lives. Questions are answered in their order; several hosts asked in turn work side by side."""

    def ask(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of the object, without waiting for it."""
        ...

    def answer(self) -> Any:
        """What the oldest question without an answer came to, or the error it raised."""
        ...

    def close(self) -> None:
        """End the object."""
        ...


class LocalHost:
    """The object lives in this process."""

    def __init__(self, make: Callable[[], Closable]) -> None:
        self._object = make()
        self._answers: list[Any] = []

    def ask(self, method: str, *arguments: Any, **options: Any) -> None:
        """See `Host.ask`; the work is done at once."""
        self._answers.append(getattr(self._object, method)(*arguments, **options))

    def answer(self) -> Any:
        """See `Host.answer`."""
        return self._answers.pop(0)

    def close(self) -> None:
        """See `Host.close`."""
        self._object.close()


class ProcessHost:
    """The object is made by `make`, which must pickle, in a spawned process that ends with this one.

    A `ForeframeError` raised there is raised here, and the object lives on. Any other error ends the process with its
    traceback on stderr and is a `MachineError` here, as is a process that was killed.
    """

    def __init__(self, make: Callable[[], Closable]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _environment(ONE_THREAD):
            self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any, **options: Any) -> None:
        """See `Host.ask`."""
        try:
            self._connection.send((method, arguments, options))
        except OSError:
            self.answer()  # what it left behind: it may have said why
            raise self._death() from None

    def answer(self) -> Any:
        """See `Host.answer`."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, ForeframeError):
            raise answer
        return answer

    def close(self) -> None:
        """See `Host.close`; a process that does not end by itself is killed."""
        self._connection.close()
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> MachineError:
        self._process.join(CLOSE_TIMEOUT_S)
        return MachineError(
            f"a simulator process ended with code {self._process.exitcode} (-9: killed, often for want of memory).",
            remedy="Run again: finished work is kept. Its own message, if it left one, is above.",
        )


def _serve(connection: Connection, make: Callable[[], Closable]) -> None:
    """The process's main: calls until nobody asks any more."""
    end_with_parent()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            living = make()
        except ForeframeError as error:
            connection.send(error)
            return
        try:
            while True:
                method, arguments, options = connection.recv()
                connection.send(_outcome(living, method, arguments, options))
        finally:
            living.close()


def _outcome(living: Closable, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    try:
        return getattr(living, method)(*arguments, **options)
    except ForeframeError as error:
        return error


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
