"""Damaged copies of good videos, each through `transcode`: `python -m tests.faults.damaged_media --mutants 300`.

A quarter of the mutants each is cut short, has 1 to 64 bytes changed, 16 to 4,096 bytes zeroed, 1 to 256 bytes
removed. They are decoded one after another in a limited child; what kills it or does not end is counted and the child
replaced. A file is accepted whole if it gives as many frames as the original, short if it gives fewer. Containers that
declare no number of frames have a table of their own: what is accepted of them is marked `unverified` in its record.
Changed bytes inside pictures cannot be told from content without a hash of the source.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from infra.faults import fault_point
from infra.media import MediaError, probe
from infra.media_transcode import TranscodeSettings, transcode
from tests.helpers_damage import DAMAGES, FRAMES, KINDS, Kind, damaged, make_kind

HANG_S = 20.0
MEMORY_BYTES = 2 << 30
SETTINGS = TranscodeSettings(short_side=48)
PROJECT = Path(__file__).resolve().parents[2]
OUTCOMES = ("rejected", "whole", "SHORT", "long", "crash", "hang")


@dataclass(frozen=True)
class Mutant:
    """One damaged file and how it was made."""

    path: Path
    kind: Kind
    damage: str


@dataclass(frozen=True)
class Result:
    """What became of a mutant; `detail` is the reason of a rejection, or of a death."""

    outcome: str
    detail: str = ""
    unverified: bool = False


def make_mutants(folder: Path, kinds: list[Kind], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the kinds in turn, equal shares of each damage."""
    originals = [make_kind(kind, folder).read_bytes() for kind in kinds]
    random, mutants = Random(seed), []
    for number in range(count):
        which = number // len(DAMAGES) % len(kinds)
        damage = DAMAGES[number % len(DAMAGES)]
        path = folder / f"mutant-{number:05d}{kinds[which].suffix}"
        path.write_bytes(damaged(originals[which], damage, random))
        mutants.append(Mutant(path, kinds[which], damage))
    return mutants


def decode_all(mutants: list[Mutant]) -> list[Result]:
    """The mutants through a child, in order; a dead or hung child is replaced and its mutant named."""
    results: list[Result] = []
    while len(results) < len(mutants):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.damaged_media", "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        with child:
            try:
                results += _answers(child, mutants[len(results) :])
            finally:
                child.kill()
    return results


def _answers(child: subprocess.Popen[bytes], mutants: list[Mutant]) -> Iterator[Result]:
    assert child.stdin is not None and child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        for mutant in mutants:
            child.stdin.write(f"{mutant.path}\n".encode())
            child.stdin.flush()
            if not selector.select(HANG_S):
                yield Result("hang")
                return
            line = child.stdout.readline()
            if not line:
                yield Result("crash", f"exit code {child.wait()}")
                return
            answer = json.loads(line)
            if "reason" in answer:
                yield Result("rejected", answer["reason"])
                continue
            frames = answer["frames"]
            outcome = "whole" if frames == FRAMES else "SHORT" if frames < FRAMES else "long"
            yield Result(outcome, f"{frames} frames", answer["unverified"])


def serve_child() -> None:
    """Answer a line of JSON for each path on standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        fault_point("media.damaged", detail=path.name)
        try:
            frames = len(transcode(path, SETTINGS).members)
            answer: dict[str, object] = {"frames": frames, "unverified": probe(path).declared_frames is None}
        except MediaError as error:
            answer = {"reason": error.reason}
        print(json.dumps(answer), flush=True)


def table(mutants: list[Mutant], results: list[Result], *, by: str) -> list[str]:
    """Rows of a Markdown table: one for each damage (or container), and the sum."""
    names = DAMAGES if by == "damage" else tuple(dict.fromkeys(mutant.kind.name for mutant in mutants))
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*names, "all")}
    for mutant, result in zip(mutants, results, strict=True):
        name = mutant.damage if by == "damage" else mutant.kind.name
        for row in (counts[name], counts["all"]):
            row.update([result.outcome, "tried"])
            row.update(["unverified"] if result.unverified else [])
    columns = ("tried", *OUTCOMES, "unverified")
    lines = [f"| {by} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in counts.items()]
    reasons = Counter(result.detail for result in results if result.outcome == "rejected")
    return [*lines, f"rejected as: {', '.join(f'{name} {count}' for name, count in reasons.most_common())}"]


def main() -> int:
    """Damage, decode, print; 1 if a container that declares its frames was accepted short, or anything died."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=300, help="of each of the two groups of containers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="copy what was accepted short, died or hung to this folder")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve_child()
        return 0
    bad = 0
    for counted in (True, False):
        kinds = [kind for kind in KINDS if kind.counted == counted]
        with tempfile.TemporaryDirectory() as folder:
            mutants = make_mutants(Path(folder), kinds, arguments.mutants, arguments.seed)
            results = decode_all(mutants)
            for mutant, result in zip(mutants, results, strict=True):
                if result.outcome not in ("SHORT", "long", "crash", "hang"):
                    continue
                bad += counted or result.outcome in ("crash", "hang")
                print(f"{mutant.path.name} ({mutant.kind.name}, {mutant.damage}): {result.outcome} {result.detail}")
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    (arguments.keep / mutant.path.name).write_bytes(mutant.path.read_bytes())
        print(f"\ncontainers that declare {'their' if counted else 'no'} number of frames, seed {arguments.seed}:\n")
        print("\n".join([*table(mutants, results, by="damage"), "", *table(mutants, results, by="container"), ""]))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
