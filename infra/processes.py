"""Child processes that end when they should: known by pid and start time, stopped with everything they started.

A pid alone may name a stranger after a restart, so every stop compares the start time first. A family is a process,
its descendants, and all members of the session it leads: children whose parent died stay in the session.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from infra.config import Config
from infra.errors import MachineError, ServiceError

PROC = Path("/proc")
PR_SET_PDEATHSIG = 1
LOG_TAIL_LINES = 5


class ProcessId(Config):
    """A process, for as long as this boot lasts."""

    pid: int
    started: str  # boot id and start tick


def identify(pid: int) -> ProcessId | None:
    """Who runs under a pid now; None when nobody does (a zombie is nobody)."""
    fields = _stat(pid)
    if fields is None or fields[0] == "Z":
        return None
    return ProcessId(pid=pid, started=f"{_boot_id()}-{fields[19]}")


def is_alive(process: ProcessId) -> bool:
    """Whether that very process still runs."""
    return identify(process.pid) == process


def spawn(argv: Sequence[str], *, log_path: Path, env: Mapping[str, str], cwd: Path) -> ProcessId:
    """Start a program as leader of a session of its own, output appended to a file; it outlives this process."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as stream:
        child = subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Until it is reaped the pid cannot be reused; a program that died at once is told from its log.
    identity = identify(child.pid)
    if identity is None:
        raise ServiceError(f"{Path(argv[0]).name} ended at once: {tail(log_path)}", remedy=f"See {log_path}.")
    return identity


def end_with_parent() -> None:
    """For `preexec_fn`: the kernel sends SIGTERM to this process when the thread that started it dies."""
    if sys.platform == "linux":
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def family(process: ProcessId) -> list[ProcessId]:
    """The process, its descendants and the members of the session it leads, as far as they live."""
    table = {pid: fields for pid in _pids() if (fields := _stat(pid)) is not None}
    members = {process.pid}
    grown = True
    while grown:
        found = {pid for pid, fields in table.items() if int(fields[1]) in members or int(fields[3]) == process.pid}
        grown = not found <= members
        members |= found
    identities = [identify(pid) for pid in sorted(members)]
    return [found for found in identities if found and (found.pid != process.pid or found == process)]


def stop(process: ProcessId, *, grace_s: float = 15.0) -> bool:
    """SIGTERM to the process, then SIGKILL to what is left of its family. False if it was gone already.

    Only the process itself is asked: a leader that loses its members first (Ray, a server) waits for them in vain.
    Nothing is signalled when the pid belongs to another process by now.
    """
    if not is_alive(process):
        return False
    known = family(process)
    _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and is_alive(process):
        known = _merge(known, family(process))
        reap(process.pid)
        time.sleep(0.1)
    for member in _merge(known, family(process) if is_alive(process) else []):
        _signal(member, signal.SIGKILL)
    # Killed members vanish a moment later; callers expect ports and files to be free.
    wait_for(lambda: not any(is_alive(member) for member in known), timeout_s=5.0)
    reap(process.pid)
    return True


def reap(pid: int) -> None:
    """Collect a child that ended, so that it does not stay as a zombie; no child of ours is fine."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def wait_for(check: Callable[[], bool], *, timeout_s: float, every_s: float = 0.1) -> bool:
    """Poll until `check` holds; False on timeout."""
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def free_port(preferred: int = 0) -> int:
    """A TCP port on loopback: the preferred one if nobody listens there, else any."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise MachineError("no free TCP port on 127.0.0.1.", remedy="Close some programs.")


def tail(path: Path, *, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, on one line."""
    if not path.is_file():
        return "no output"
    text = path.read_text(errors="replace").strip().splitlines()[-lines:]
    return " | ".join(line.strip() for line in text) or "no output"


def _merge(left: list[ProcessId], right: list[ProcessId]) -> list[ProcessId]:
    return list({(item.pid, item.started): item for item in [*left, *right]}.values())


def _signal(process: ProcessId, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if is_alive(process):
            os.kill(process.pid, number)


def _pids() -> list[int]:
    if not PROC.is_dir():
        raise MachineError("this system has no /proc.", remedy="Services are started on Linux only.")
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on: 0 state, 1 parent, 2 group, 3 session, 19 start tick."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    return text.rpartition(")")[2].split()


@lru_cache(maxsize=1)
def _boot_id() -> str:
    path = PROC / "sys/kernel/random/boot_id"
    return path.read_text().strip()[:8] if path.is_file() else ""


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_libc()  # loaded now: after a fork nothing may be loaded any more
