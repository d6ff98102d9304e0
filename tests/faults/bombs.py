"""Containers that ask for too much, each in a child of its own: `python -m tests.faults.bombs`.

Every case goes through `transcode` with the default limits of the recipe, none on memory or time, so that what is
measured is what the checks allow. Printed are the answer, the peak of resident memory and the CPU seconds after import.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.media import MediaError
from infra.media_transcode import TranscodeSettings, transcode
from tests.helpers_bombs import make_bombs

PROJECT = Path(__file__).resolve().parents[2]
PEAK_MIB, CPU_S = 512, 5.0
TIMEOUT_S = 60


@dataclass(frozen=True)
class Cost:
    """What a file came to: the reason of its refusal, or how many frames it gave."""

    name: str
    answer: str
    peak_mib: int
    cpu_s: float

    @property
    def cheap(self) -> bool:
        """Within the goal, and ended by itself."""
        return self.peak_mib < PEAK_MIB and self.cpu_s < CPU_S and self.answer not in ("crash", "hang")


def measure(path: Path, *, engine: str) -> Cost:
    """Transcode a file in a child."""
    argv = [sys.executable, "-m", "tests.faults.bombs", "--child", str(path), "--engine", engine]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    try:
        ended = subprocess.run(argv, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Cost(path.name, "hang", 0, TIMEOUT_S)
    if ended.returncode:
        return Cost(path.name, "crash", 0, 0)
    return Cost(path.name, **json.loads(ended.stdout))


def measure_all(folder: Path, *, engine: str = "pyav") -> Iterator[Cost]:
    """Every case."""
    for path in make_bombs(folder):
        yield measure(path, engine=engine)


def in_child(path: Path, engine: str) -> None:
    """Print what the file costs this process, and the programs it starts."""
    before = _cpu_s()
    try:
        settings = TranscodeSettings(short_side=32, engine="ffmpeg" if engine == "ffmpeg" else "pyav")
        answer = f"{len(transcode(path, settings).members)} frames"
    except MediaError as error:
        answer = error.reason
    # Not ru_maxrss of this process: that begins with what the parent had at the fork.
    status = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    peak_kib = max(peak_kib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    print(json.dumps({"answer": answer, "peak_mib": peak_kib >> 10, "cpu_s": _cpu_s() - before}))


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def main() -> int:
    """Print the table; 1 if a case is dear."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["pyav", "ffmpeg"], default="pyav")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        in_child(arguments.child, arguments.engine)
        return 0
    print("| case | answer | peak MiB | CPU s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        costs = []
        for cost in measure_all(Path(folder), engine=arguments.engine):
            costs.append(cost)
            print(f"| {cost.name} | {cost.answer} | {cost.peak_mib} | {cost.cpu_s:.2f} |", flush=True)
    dear = sum(not cost.cheap for cost in costs)
    print(
        f"\n{len(costs)} cases, at most {max(c.peak_mib for c in costs)} MiB and {max(c.cpu_s for c in costs):.2f} s;",
        end=" ",
    )
    print(f"{dear} above {PEAK_MIB} MiB or {CPU_S:g} s")
    return int(dear > 0)


if __name__ == "__main__":
    sys.exit(main())
