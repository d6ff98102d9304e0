"""Supervised children: deadline over the whole group, stderr that never blocks, no shell."""

import os
import sys
import time
from pathlib import Path

from infra.supervise import Supervised, run


def test_deadline_ends_the_child_and_its_children(tmp_path):
    marker = tmp_path / "pid"
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(marker)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    outcome = run([sys.executable, "-c", code], timeout_s=2.0)
    assert outcome.timed_out and not outcome.crashed
    assert time.monotonic() - started < 20
    grandchild = int(marker.read_text())
    for _ in range(100):
        if not is_running(grandchild):
            break
        time.sleep(0.05)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_flood_on_stderr_neither_blocks_nor_grows(tmp_path):
    code = "import sys; sys.stderr.write('x' * 5_000_000 + 'last words'); sys.stdout.write('y' * 500_000)"
    outcome = run([sys.executable, "-c", code], timeout_s=60, stdout=tmp_path / "out")
    assert outcome.returncode == 0
    assert outcome.stderr_tail.endswith("last words") and len(outcome.stderr_tail) <= 4096
    assert (tmp_path / "out").stat().st_size == 500_000


def test_leaving_early_kills():
    with Supervised(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], timeout_s=60
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        pid = child._process.pid
    assert not is_running(pid)


def test_a_crash_is_told_from_a_failure():
    crashed = run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {11})"], timeout_s=60)
    assert crashed.crashed and crashed.returncode == -11
    failed = run([sys.executable, "-c", "raise SystemExit(3)"], timeout_s=60)
    assert not failed.crashed and failed.returncode == 3
    assert run(["/bin/echo", "$HOME; exit 7"], timeout_s=60, env=dict(os.environ)).returncode == 0
