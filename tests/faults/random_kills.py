"""Ingest on Ray, killed at random, and run again: `python -m tests.faults.random_kills --kills 50`.

Each run suffers one kill (SIGKILL) and is followed at once by another, until one ends well: Ray replaces a worker, so
only a dead driver leaves work behind. Killed is the driver at any instant, a Ray worker at any instant, or whoever
passes a named point: in the middle of a tar, of a receipt, of the plan, between the files of a shard, around the
manifest. The finished data set must be, to the last byte, the one that an undisturbed run in one process makes;
shards that were committed stay untouched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from infra.storage import list_names, read_json
from ingest import job
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from ingest.verify import verify
from tests.helpers_media import make_video

PROJECT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S = 240.0
NUM_CLIPS = 10
POINTS = {
    "in a tar": ("ingest.after_clip", "ingest.before_tar"),
    "in a receipt": ("storage.half_written@receipt", "storage.before_link@receipt"),
    "between files": ("ingest.after_tar", "ingest.after_idx", "ingest.after_receipt"),
    "plan": ("ingest.before_plan", "storage.half_written@plan", "storage.before_link@plan", "ingest.after_plan"),
    "manifest": ("ingest.before_manifest", "storage.half_written@manifest", "ingest.after_manifest"),
}
KINDS = ("driver", "worker", *POINTS)


@dataclass
class Tally:
    """What was killed, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    outputs: int = 0
    different: int = 0
    lost: int = 0
    duplicated: int = 0
    touched: int = 0  # committed shards that a later run wrote again
    redone: int = 0  # shards of which an attempt died before the one that was committed


def make_corpus(folder: Path) -> None:
    """Clips of several sizes and containers, and one that is no video."""
    for number in range(NUM_CLIPS):
        suffix = (".mp4", ".mkv", ".mov")[number % 3]
        make_video(folder / f"clip-{number}{suffix}", frames=8 + number, size=f"{64 + 16 * (number % 4)}x64")
    (folder / "broken.mp4").write_bytes(b"no video")


def config_of(corpus: Path, output: Path, *, workers: int) -> IngestConfig:
    """Five shards or so."""
    recipe = Recipe(short_side=48, shard_bytes=60_000, max_failure_share=0.5)
    return IngestConfig(source=str(corpus), output=str(output), name="kills", recipe=recipe, workers=workers)


def content(output: Path) -> dict[str, bytes]:
    """Every visible file but the logs."""
    return {name: (output / name).read_bytes() for name in list_names(output) if not name.endswith(".log.json")}


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that the runs of this folder have started, orphans among them, and their command lines."""
    mark = f"FOREFRAME_HOME={folder / 'home'}".encode()
    found: dict[int, str] = {}
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and mark in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


@contextlib.contextmanager
def driver(config: IngestConfig, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own, with a Ray of its own; whatever it has started is gone after the block."""
    config.save(folder / "config.json")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FOREFRAME_"))}
    variables |= {"PYTHONPATH": str(PROJECT), "FOREFRAME_HOME": str(folder / "home"), **environment}
    with (folder / "driver.log").open("ab") as log:
        argv = [sys.executable, "-m", "ingest.main", str(folder / "config.json")]
        child = subprocess.Popen(argv, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Killer:
    """Runs an ingest and kills something of it."""

    def __init__(self, folder: Path, seed: int, usual_s: float) -> None:
        self.folder, self.random, self.usual_s = folder, Random(seed), usual_s
        self.tally = Tally()

    def run(self, config: IngestConfig, kind: str) -> bool:
        """One run with a kill of that kind, "" for none. True if it ended well all the same."""
        self.tally.runs += 1
        once = self.folder / f"once-{self.tally.runs}"
        environment = {}
        if kind in POINTS:
            point = self.random.choice(POINTS[kind])
            environment = {"FOREFRAME_FAULT": point, "FOREFRAME_FAULT_ONCE": str(once)}
        with driver(config, self.folder, **environment) as child:
            killed = {"driver": self._kill_driver, "worker": self._kill_worker}.get(kind, lambda _: False)(child)
            code = child.wait(RUN_TIMEOUT_S)
        killed = killed or once.exists()
        self.tally.kills.update([kind] if killed else [])
        if code and not killed:
            raise SystemExit(f"a run failed by itself:\n{(self.folder / 'driver.log').read_text()[-2000:]}")
        return code == 0

    def _kill_driver(self, child: subprocess.Popen[bytes]) -> bool:
        try:
            child.wait(self.random.uniform(0.3, 1.0) * self.usual_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return True
        return False

    def _kill_worker(self, child: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while child.poll() is None and time.monotonic() < deadline:
            busy = [pid for pid, line in processes_of(self.folder).items() if "build_row" in line]
            if busy:
                time.sleep(self.random.uniform(0, 0.6))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(busy), signal.SIGKILL)
                    return True
            time.sleep(0.05)
        return False

    def output(self, corpus: Path, expected: dict[str, bytes], kinds: list[str]) -> None:
        """Ingest into a new output with kills of these kinds, taken from the end, until a run ends well."""
        place = self.folder / f"data-{self.tally.outputs}"
        config = config_of(corpus, place, workers=2)
        while True:
            committed = {path: path.stat().st_mtime_ns for path in place.glob("shard-*.receipt.json")}
            before = self.tally.kills.total()
            planned = (place / "plan.json").exists()
            kind = next((kind for kind in reversed(kinds) if kind != "plan" or not planned), "")
            finished = self.run(config, kind)
            if kind:
                kinds.reverse()
                kinds.remove(kind)
                kinds.reverse()
            if kind and self.tally.kills.total() == before:
                kinds.insert(0, kind)  # it did not come to pass; another time
            self.tally.touched += sum(path.stat().st_mtime_ns != stamp for path, stamp in committed.items())
            if finished:
                break
        self.tally.outputs += 1
        self.tally.different += content(place) != expected or verify(str(place)) != []
        data = ShardDataset(str(place))
        found = Counter(data.record(index).source_id for index in range(len(data)))
        self.tally.lost += NUM_CLIPS - len(found)
        self.tally.duplicated += found.total() - len(found)
        logs = list_names(place, suffix=".log.json")
        self.tally.redone += sum(read_json(place / name)["attempt"] > 0 for name in logs)


def kill_at_random(folder: Path, *, kills: int, seed: int) -> Tally:
    """So many kills, equal shares of all kinds, in random order and at random instants."""
    make_corpus(folder / "corpus")
    job.run(config_of(folder / "corpus", folder / "undisturbed", workers=0))
    expected = content(folder / "undisturbed")
    killer = Killer(folder, seed, usual_s=0)
    started = time.monotonic()
    killer.output(folder / "corpus", expected, [])  # also a check that Ray makes the same
    killer.usual_s = time.monotonic() - started
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    killer.random.shuffle(kinds)
    while kinds:
        killer.output(folder / "corpus", expected, kinds)
        print(f"{killer.tally.kills.total()} kills, {killer.tally.different} different", file=sys.stderr, flush=True)
    return killer.tally


def main() -> int:
    """Print the table; 1 if anything was lost, duplicated, different, or built again after its commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        tally = kill_at_random(Path(folder), kills=arguments.kills, seed=arguments.seed)
        seconds = time.monotonic() - started
    print(f"seed {arguments.seed}: {tally.runs} runs into {tally.outputs} outputs in {seconds:.0f} s\n")
    print("| killed | times |\n| --- | --- |")
    print("\n".join(f"| {kind} | {tally.kills[kind]} |" for kind in KINDS))
    print(f"| all | {tally.kills.total()} |\n")
    print(
        "| outputs | different from undisturbed | clips lost | duplicated | committed shards touched | shards redone |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    figures = (tally.outputs, tally.different, tally.lost, tally.duplicated, tally.touched, tally.redone)
    print(f"| {' | '.join(map(str, figures))} |")
    return int(bool(tally.different or tally.lost or tally.duplicated or tally.touched))


if __name__ == "__main__":
    sys.exit(main())
