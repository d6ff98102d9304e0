"""Flows run as a user runs them: a home of their own, the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.settings import settings
from pipelines import cli

TIMEOUT_S = 500


@contextmanager
def own_home(folder: Path) -> Iterator[Path]:
    """A home folder for this process and for the commands it starts; steps run inside the flow's process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("FOREFRAME_", "PREFECT_"))]:
            if name not in ("FOREFRAME_GOLDEN", "FOREFRAME_CORPUS"):
                patch.delenv(name)
        patch.setenv("FOREFRAME_HOME", str(folder))
        patch.setenv("FOREFRAME_BACKEND", "inline")
        settings.cache_clear()
        yield folder
    settings.cache_clear()


def flow(*arguments: str) -> str:
    """What a verb that runs a flow prints. In a process of its own: after a flow a process cannot fork cleanly."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def command(*arguments: str) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return int(stopped.value.code or 0)


def files(home: Path) -> dict[str, int]:
    """What a stage may leave, and when it was written; services' databases and logs change with every look."""
    kept = ("datasets", "runs", "caches", "results", "sources")
    return {str(path): path.stat().st_mtime_ns for name in kept for path in (home / name).rglob("*") if path.is_file()}


def words(**options: list[str]) -> list[str]:
    """override=["a=1"] -> --override a=1, for every option and value."""
    return [
        word
        for option, values in options.items()
        for value in values
        for word in (f"--{option.replace('_', '-')}", value)
    ]
