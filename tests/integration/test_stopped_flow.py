"""A command that is told to end takes everything along that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def running_with(home: Path) -> dict[int, str]:
    """Command lines of the processes whose environment names this home folder, by process id."""
    found = {}
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and f"FOREFRAME_HOME={home}\0".encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended while we looked, or is not ours
            continue
    return {number: line for number, line in found.items() if line}


def wait_for(what: Callable[[], bool], *, seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.2)
    return False


@pytest.mark.ray
def test_a_command_told_to_end_leaves_neither_a_server_nor_a_ray_behind(tmp_path: Path) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    with log.open("wb") as output:
        command = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "run", "ingest-corpus", "-p", 'simulate=["episodes=500"]'],
            env={**os.environ, "FOREFRAME_HOME": str(home), "FOREFRAME_BACKEND": "local"},
            cwd=Path(__file__).parents[2], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        assert wait_for(lambda: b"episodes missing" in log.read_bytes()), log.read_text()
        lines = " ".join(running_with(home).values())
        assert "uvicorn" in lines and "raylet" in lines and "ingest.main" in lines
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
        assert wait_for(lambda: not running_with(home), seconds=30), running_with(home)
    finally:
        for number in running_with(home):
            os.kill(number, signal.SIGKILL)
