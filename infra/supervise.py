"""Child processes that cannot hang us: own process group, drained and bounded stderr, a deadline that kills the group.

No shell anywhere: a command is a list. The child's standard input is empty.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

TAIL_BYTES = 4096
KILL_WAIT_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `returncode` is negative when a signal ended it."""

    returncode: int
    timed_out: bool
    stderr_tail: str

    @property
    def crashed(self) -> bool:
        """Ended by a signal that we did not send."""
        return self.returncode < 0 and not self.timed_out


class Supervised:
    """A running child. Read `stdout` (or give a file), then `finish`; leaving the block early kills the group."""

    def __init__(
        self,
        argv: list[str],
        *,
        timeout_s: float,
        cwd: Path | None = None,
        stdout: int | IO[bytes] = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.stdout = self._process.stdout
        self._tail = b""
        self._timed_out = False
        self._drain = threading.Thread(target=self._keep_tail, daemon=True)
        self._drain.start()
        self._deadline = threading.Timer(timeout_s, self._expire)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> Outcome:
        """Wait for the end; the deadline bounds it."""
        self._process.wait()
        self._deadline.cancel()
        self._drain.join(KILL_WAIT_S)
        return Outcome(self._process.returncode, self._timed_out, self._tail.decode(errors="replace").strip())

    def kill(self) -> None:
        """SIGKILL to the whole group; nothing if it is gone."""
        # The group id is the child's id, which stays taken until we have waited for it.
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _expire(self) -> None:
        self._timed_out = True
        self.kill()

    def _keep_tail(self) -> None:
        assert self._process.stderr is not None
        while chunk := self._process.stderr.read1(TAIL_BYTES):  # type: ignore[attr-defined]
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline.cancel()
        self.kill()
        self._process.wait()
        if self.stdout is not None:
            self.stdout.close()


def run(
    argv: list[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    stdout: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a child to its end, its standard output going to a file or nowhere."""
    with contextlib.ExitStack() as stack:
        target: int | IO[bytes] = stack.enter_context(stdout.open("wb")) if stdout else subprocess.DEVNULL
        child = stack.enter_context(Supervised(argv, timeout_s=timeout_s, cwd=cwd, stdout=target, env=env))
        return child.finish()
