"""What broken files cost: `python -m tests.bench.bench_broken_corpus`.

A corpus of which 5 % is broken (cut short, zero bytes, text, one that kills the decoder, one that never ends, in turn)
against its good part alone, in rounds that alternate; each is built by a process of its own, which is started again
when a video has killed it, as its user would. CPU seconds of those processes and all their children, restarts
included. Every good clip must be there, every broken one in the ledger with its reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from tests.helpers_media import ffmpeg, make_video

log = logging.getLogger("bench")
PROJECT = Path(__file__).resolve().parents[2]
DISTINCT = 6  # videos that are really encoded; the others are copies with another title
KINDS = ("truncated", "empty", "not_video", "crash", "timeout")
HANG_S = 4.0
MAX_STARTS = 12


def make_good(folder: Path, *, clips: int, seconds: int, size: str) -> None:
    """Clips of equal length and different content hashes."""
    folder.mkdir()
    for number in range(min(clips, DISTINCT)):
        options = ["-preset", "veryfast", "-vf", f"hue=h={40 * number}"]
        make_video(folder / f"good-{number:04d}.mp4", frames=30 * seconds, fps=30, size=size, options=options)
    for number in range(DISTINCT, clips):
        source, target = folder / f"good-{number % DISTINCT:04d}.mp4", folder / f"good-{number:04d}.mp4"
        argv = [ffmpeg(), "-nostdin", "-loglevel", "error", "-i", str(source), "-c", "copy"]
        subprocess.run([*argv, "-metadata", f"title={number}", str(target)], check=True)


def add_broken(folder: Path, count: int) -> dict[str, str]:
    """Broken files of all kinds beside the good ones; the reason expected of each."""
    expected = {}
    good = sorted(folder.glob("good-*.mp4"))
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        # Spread over the corpus, and so over the shards.
        name = f"{good[(2 * number + 1) * len(good) // (2 * count)].stem}-{kind}.mp4"
        data = good[number % len(good)].read_bytes()
        broken = {"truncated": data[: len(data) * 2 // 3], "empty": b"", "not_video": b"no video\n" * 999}
        # The others are sound, but the decoder is made to die or to hang at their names.
        sound = data + (8 + number).to_bytes(4, "big") + b"free" + bytes(number)
        (folder / name).write_bytes(broken.get(kind, sound))
        expected[name] = kind
    return expected


def build(corpus: Path, output: Path, *, shard_bytes: int) -> tuple[float, int]:
    """(CPU seconds, starts) until the data set is finished."""
    recipe = Recipe(max_failure_share=0.2, item_timeout_s=HANG_S, shard_bytes=shard_bytes)
    config = IngestConfig(source=str(corpus), output=str(output), name="broken", recipe=recipe, workers=0)
    config.save(output.with_suffix(".json"))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment["FOREFRAME_FAULT"] = "ingest.decode@-crash,ingest.decode@-timeout=hang"
    before = _children_s()
    for start in range(1, MAX_STARTS + 1):
        argv = [sys.executable, "-m", "ingest.main", str(output.with_suffix(".json"))]
        ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        if ended.returncode == 0:
            return _children_s() - before, start
    raise SystemExit(f"no end after {MAX_STARTS} starts: {ended.stderr[-1000:]}")


def check(output: Path, *, clips: int, expected: dict[str, str]) -> None:
    """Every clip is where it belongs, or the benchmark ends."""
    data = ShardDataset(str(output))
    found = [data.record(index).source_id for index in range(len(data))]
    manifest = json.loads((output / "manifest.json").read_bytes())
    ledger = {entry["path"]: entry["reason"] for part in manifest["receipts"] for entry in part["failures"]}
    if len(found) != clips or len(set(found)) != clips or ledger != expected:
        raise SystemExit(f"{len(found)} of {clips} good clips, ledger {ledger}, expected {expected}")


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Build the corpora, alternate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=95, help="good ones; a nineteenth as many broken are added")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--size", default="854x480")
    parser.add_argument("--shard-bytes", type=int, default=32 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = {"clips": arguments.clips, "seconds": arguments.seconds, "size": arguments.size}
        make_good(folder / "clean", **size)
        shutil.copytree(folder / "clean", folder / "broken", copy_function=os.link)
        expected = add_broken(folder / "broken", round(arguments.clips / 19))
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(expected.values()).items())
        log.info("load %.1f; %s; broken: %s", os.getloadavg()[0], size, kinds)
        seconds: dict[str, list[float]] = {"clean": [], "broken": []}
        starts = 0
        for number in range(arguments.rounds):
            for side, taken in seconds.items():
                output = folder / f"{side}-{number}"
                spent, starts = build(folder / side, output, shard_bytes=arguments.shard_bytes)
                taken.append(spent)
                check(output, clips=arguments.clips, expected=expected if side == "broken" else {})
                num_shards = len(list(output.glob("shard-*.tar")))
                shutil.rmtree(output)
            log.info("round %d: %s", number, {side: round(taken[-1], 1) for side, taken in seconds.items()})
        ratio = statistics.median(b / c for b, c in zip(seconds["broken"], seconds["clean"], strict=True))
        log.info(
            "\n| clips | broken | shards | starts | clean CPU s | broken CPU s | ratio | goal |\n%s", "| --- " * 8 + "|"
        )
        medians = [f"{statistics.median(seconds[side]):.1f}" for side in ("clean", "broken")]
        row = [arguments.clips, len(expected), num_shards, starts, *medians, f"{ratio:.3f}", "<= 1.15"]
        log.info("| %s |", " | ".join(map(str, row)))
        log.info("\nevery good clip present, every broken one in the ledger; load %.1f at the end", os.getloadavg()[0])


if __name__ == "__main__":
    main()
