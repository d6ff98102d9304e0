"""A chain in its environment: in a process of its own, or here.

One process for each chain: physics engines keep what the last chain left (warm starts, contact caches), and CALVIN's
environment uses the engine's first world for some calls, so that a chain's numbers would depend on what was played
before it or beside it. A fresh process makes them a function of the chain and the policy.

Shape letters: T steps, A action.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from evaluation.calvin.chains import Chain, start_of
from evaluation.calvin.environment import Benchmark, Picture, Seen
from infra.errors import ForeframeError, MachineError
from infra.processes import end_with_parent

Actions = npt.NDArray[np.float32]
FILMED = "static"
ANSWER_TIMEOUT_S = 600.0  # the first answer includes importing and building an environment on a busy machine
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Moved:
    """What executed actions led to: steps taken until solved or to the end of the chunk, pictures for the clip."""

    seen: Seen
    num_steps: int
    solved: bool
    frames: tuple[Picture, ...] = ()


class Actor(Protocol):
    """One chain's environment. Ask first, fetch the answer later: between the two, others work."""

    def ask_start(self, task: str) -> None:
        """Begin a subtask where the last one ended; the answer is what is seen."""
        ...

    def ask_advance(self, actions_TA: Actions) -> None:
        """Execute actions until the subtask is solved; the answer is a `Moved`."""
        ...

    def started(self) -> Seen:
        """The answer to `ask_start`."""
        ...

    def moved(self) -> Moved:
        """The answer to `ask_advance`."""
        ...

    def close(self) -> None:
        """End the environment; more than once is fine."""
        ...


class Stage:
    """A world with one chain in it."""

    def __init__(self, benchmark: Benchmark, chain: Chain, *, clip_stride: int) -> None:
        self._world, self._clip_stride = benchmark.build(), clip_stride
        robot, scene = start_of(chain.state)
        self._world.environment.reset(robot_obs=robot, scene_obs=scene)
        self._task, self._num_steps = "", 0
        self._start_info: Any = None

    def start(self, task: str) -> Seen:
        """The subtask begins now: the oracle compares with this moment."""
        environment = self._world.environment
        self._task, self._start_info = task, environment.get_info()
        return Seen.of(environment.get_obs())

    def advance(self, actions_TA: Actions) -> Moved:
        """Steps until the oracle is content; `clip_stride` 0 films nothing."""
        frames: list[Picture] = []
        seen, solved, num_steps = None, False, 0
        for action_A in actions_TA:
            # A copy of doubles: the environment scales the array it is given in place.
            observation, _, _, info = self._world.environment.step(action_A.astype(np.float64))
            num_steps += 1
            self._num_steps += 1
            seen = Seen.of(observation)
            if self._clip_stride and self._num_steps % self._clip_stride == 0:
                frames.append(seen.images[FILMED])
            solved = bool(self._world.oracle.get_task_info_for_set(self._start_info, info, {self._task}))
            if solved:
                break
        assert seen is not None, "a chunk holds at least one action"
        return Moved(seen, num_steps, solved, tuple(frames))

    def close(self) -> None:
        """End the environment."""
        self._world.environment.close()


class LocalActor:
    """Plays in this process."""

    def __init__(self, benchmark: Benchmark, chain: Chain, *, clip_stride: int) -> None:
        self._stage = Stage(benchmark, chain, clip_stride=clip_stride)
        self._answers: list[Any] = []
        self._closed = False

    def ask_start(self, task: str) -> None:
        """See `Actor.ask_start`."""
        self._answers.append(self._stage.start(task))

    def ask_advance(self, actions_TA: Actions) -> None:
        """See `Actor.ask_advance`."""
        self._answers.append(self._stage.advance(actions_TA))

    def started(self) -> Seen:
        """See `Actor.started`."""
        return self._answers.pop()

    def moved(self) -> Moved:
        """See `Actor.moved`."""
        return self._answers.pop()

    def close(self) -> None:
        """See `Actor.close`."""
        if not self._closed:
            self._closed = True
            self._stage.close()


class ProcessActor:
    """Plays in a spawned process. It dies with its parent; its death is a `MachineError` here."""

    def __init__(self, benchmark: Benchmark, chain: Chain, *, clip_stride: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._chain = chain
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, benchmark, chain, clip_stride), daemon=True)
        self._process.start()
        theirs.close()

    def ask_start(self, task: str) -> None:
        """See `Actor.ask_start`."""
        self._ask("start", task)

    def ask_advance(self, actions_TA: Actions) -> None:
        """See `Actor.ask_advance`."""
        self._ask("advance", actions_TA)

    def started(self) -> Seen:
        """See `Actor.started`."""
        return self._answer(Seen)

    def moved(self) -> Moved:
        """See `Actor.moved`."""
        return self._answer(Moved)

    def close(self) -> None:
        """See `Actor.close`."""
        self._connection.close()  # the process ends when nobody speaks to it any more
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, name: str, argument: Any) -> None:
        try:
            self._connection.send((name, argument))
        except OSError:
            raise self._death() from None

    def _answer(self, kind: type[Any]) -> Any:
        try:
            if not self._connection.poll(ANSWER_TIMEOUT_S):
                raise MachineError(
                    f"the CALVIN process of {self._chain.item_id} has not answered for {ANSWER_TIMEOUT_S:.0f} s.",
                    remedy="Run again: finished chains are kept. With use_egl, try the CPU renderer.",
                )
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, ForeframeError):
            raise answer
        assert isinstance(answer, kind), answer
        return answer

    def _death(self) -> MachineError:
        self._process.join(CLOSE_TIMEOUT_S)
        return MachineError(
            f"the CALVIN process of {self._chain.item_id} ended with code {self._process.exitcode}.",
            remedy="Its own message is above. Run again: finished chains are kept; processes=0 plays in this process.",
        )


def _serve(connection: Connection, benchmark: Benchmark, chain: Chain, clip_stride: int) -> None:
    """The process's main: one chain, commands until the other side is gone."""
    end_with_parent()
    try:
        stage = Stage(benchmark, chain, clip_stride=clip_stride)
        commands: dict[str, Callable[[Any], Any]] = {"start": stage.start, "advance": stage.advance}
        while True:
            name, argument = connection.recv()
            connection.send(commands[name](argument))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except ForeframeError as error:
        connection.send(error)
