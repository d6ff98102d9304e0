"""Source videos made by the ffmpeg program, and broken ones made of them: nothing here uses the project's encoders."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import imageio_ffmpeg


@cache
def ffmpeg() -> str:
    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def make_video(
    path: Path, *, frames: int = 12, size: str = "96x64", fps: int = 12, codec: str = "", inputs=(), options=()
) -> Path:
    """A soft test pattern whose colours turn and whose light flickers from frame to frame; `inputs` adds others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codecs = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}
    source = f"testsrc2=size={size}:rate={fps}:duration={frames / fps},gblur=sigma=3,hue=h=n*47:b=sin(n*1.7)"
    encode = ["-c:v", codec or codecs[path.suffix], "-pix_fmt", "yuv420p", "-threads", "1", *options]
    argv = [ffmpeg(), "-nostdin", "-y", "-loglevel", "error", "-f", "lavfi", "-i", source, *inputs, *encode, str(path)]
    subprocess.run(argv, check=True, timeout=60)
    return path


def make_corpus(folder: Path) -> dict[str, int]:
    """Six good videos of five containers and codecs, odd widths among them; returns their frame counts by path."""
    videos = {
        "a/bars.mp4": {"frames": 20, "size": "96x64"},  # B-frames, index at the end
        "a/odd.webm": {"frames": 13, "size": "75x50", "codec": "libvpx-vp9"},
        "b/old.avi": {"frames": 11, "size": "64x96"},
        "b/fast.mov": {"frames": 10, "size": "96x72", "options": ["-movflags", "+faststart"]},
        "b/vp8.webm": {"frames": 12, "size": "81x54", "options": ["-auto-alt-ref", "1", "-lag-in-frames", "8"]},
        "c.mkv": {"frames": 9, "size": "64x64"},
    }
    for name, options in videos.items():
        make_video(folder / name, **options)
    return {name: options["frames"] for name, options in videos.items()}


def break_corpus(folder: Path) -> dict[str, str]:
    """Broken files beside the good ones of `make_corpus`; returns the reason expected of each path."""
    moov_last, moov_first = (folder / "a/bars.mp4").read_bytes(), (folder / "b/fast.mov").read_bytes()
    odd = (folder / "a/odd.webm").read_bytes()
    files = {
        "bad/empty.mp4": (b"", "empty"),
        "bad/text.mp4": (b"this is no video\n" * 99, "not_video"),
        "bad/script.mp4": (b"ffconcat version 1.0\nfile ../a/bars.mp4\n", "hostile_container"),
        "bad/playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "hostile_container"),
        "bad/no-index.mp4": (moov_last[: len(moov_last) * 2 // 3], "truncated"),
        "bad/cut.mov": (moov_first[: len(moov_first) * 2 // 3], "truncated"),
        "bad/cut.webm": (odd[: len(odd) // 2], "truncated"),
        "bad/copy.mp4": (moov_last, "duplicate"),
    }
    (folder / "bad").mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    audio = folder / "bad/audio.mp4"
    argv = [ffmpeg(), "-nostdin", "-y", "-loglevel", "error", "-f", "lavfi", "-i", "sine=duration=0.2", str(audio)]
    subprocess.run(argv, check=True, timeout=60)
    return {name: reason for name, (_, reason) in files.items()} | {"bad/audio.mp4": "no_video_stream"}
