"""Recordings as people have them: each made by the ffmpeg program, each stored whole by both engines and layouts."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from infra.media import MediaError, scan
from infra.media_decode import decode_video
from infra.media_encode import decode_jpeg
from infra.media_transcode import Span, Transcoded, TranscodeSettings, transcode
from tests.helpers_media import ffmpeg, make_video

PATTERN = "testsrc2=size={size}:rate={fps}:duration={seconds},gblur=sigma=3,hue=h=n*47:b=sin(n*1.7)"
# name: (lavfi input, further arguments, frames that must come out, container's own count known)
KINDS = {
    "odd.mkv": (PATTERN.format(size="75x51", fps=10, seconds=1.2), ["-c:v", "mpeg4"], 12, False),
    "single.mp4": (PATTERN.format(size="64x48", fps=10, seconds=0.1), ["-c:v", "libx264"], 1, True),
    "single.webm": (PATTERN.format(size="64x48", fps=10, seconds=0.1), ["-c:v", "libvpx"], 1, False),
    "counted-nowhere.webm": (PATTERN.format(size="64x48", fps=10, seconds=1.2), ["-c:v", "libvpx-vp9"], 12, False),
    "ten-bit.mp4": (
        PATTERN.format(size="64x48", fps=10, seconds=1.2),
        ["-c:v", "libx264", "-pix_fmt", "yuv420p10le"],
        12,
        True,
    ),
    "full-chroma.mp4": (
        PATTERN.format(size="64x48", fps=10, seconds=1.2),
        ["-c:v", "libx264", "-pix_fmt", "yuv444p"],
        12,
        True,
    ),
    "grey.mp4": (PATTERN.format(size="64x48", fps=10, seconds=1.2), ["-c:v", "libx264", "-pix_fmt", "gray"], 12, True),
    "lossless-rgb.mkv": (
        PATTERN.format(size="64x48", fps=10, seconds=1.2),
        ["-c:v", "ffv1", "-pix_fmt", "bgr0"],
        12,
        0,
    ),
    # Frames 0, 1, 4, 5, 8, 9 of twelve, at the times they had: a recording that leaves frames out.
    "variable.mp4": (
        PATTERN.format(size="64x48", fps=10, seconds=1.2) + ",select='lt(mod(n,4),2)'",
        ["-c:v", "libx264", "-fps_mode", "vfr"],
        6,
        True,
    ),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("odd")
    for name, (source, options, _, _) in KINDS.items():
        run("-f", "lavfi", "-i", source, *options, "-threads", "1", folder / name)
    sound = ["-f", "lavfi", "-i", "sine=duration=3", "-c:v", "libx264", "-c:a", "aac"]
    run("-f", "lavfi", "-i", PATTERN.format(size="64x48", fps=10, seconds=1.2), *sound, folder / "audio-longer.mp4")
    return {path.name: path for path in folder.iterdir()}


def run(*arguments: object) -> None:
    argv = [ffmpeg(), "-nostdin", "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(argv, check=True, timeout=60)


def pictures(stored: Transcoded, layout: str) -> np.ndarray:
    if layout == "video":
        return decode_video(stored.members[0])
    return np.stack([decode_jpeg(data) for data in stored.members])


@pytest.mark.parametrize("engine", ["pyav", "ffmpeg"])
@pytest.mark.parametrize("layout", ["frames", "video"])
@pytest.mark.parametrize("name", [*KINDS, "audio-longer.mp4"])
def test_every_frame_is_stored_as_it_looks(videos, name, layout, engine):
    frames = KINDS[name][2] if name in KINDS else 12
    settings = TranscodeSettings(layout=layout, engine=engine, short_side=None, jpeg_quality=95)
    stored = transcode(videos[name], settings)
    shown = pictures(stored, layout)
    assert len(shown) == stored.source_frames == len(stored.timestamps_s) == frames
    raw = reference(videos[name])[:, : shown.shape[1], : shown.shape[2]]
    assert raw.shape == shown.shape
    error = np.abs(raw.astype(int) - shown).mean(axis=(1, 2, 3))
    assert error.max() < 9, error  # sharp coloured edges at half the chroma; another frame differs by more
    if frames > 1:
        assert np.abs(raw[1:].astype(int) - shown[:-1]).mean(axis=(1, 2, 3)).min() > error.max()
    assert stored.declares_length == (bool(KINDS[name][3]) if name in KINDS else True)


def reference(path: Path) -> np.ndarray:
    """All frames as the ffmpeg program decodes them."""
    info = scan(path).info
    argv = [ffmpeg(), "-nostdin", "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough"]
    argv += ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    raw = subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, info.height, info.width, 3)


def test_times_of_a_variable_recording_are_kept(videos):
    stored = transcode(videos["variable.mp4"], TranscodeSettings(layout="video"))
    assert stored.timestamps_s == pytest.approx([0, 0.1, 0.4, 0.5, 0.8, 0.9], abs=1e-6)


def test_a_part_of_a_file_is_what_its_own_frames_are(tmp_path):
    """Three recordings in one file, as robot data sets store episodes: each part gives its own frames, all of them."""
    counts = (7, 12, 9)
    names = [make_video(tmp_path / f"{n}.mp4", frames=n, size=f"{64}x48", fps=10).name for n in counts]
    (tmp_path / "list.txt").write_text("".join(f"file {name}\n" for name in names))
    run("-f", "concat", "-i", tmp_path / "list.txt", "-c:v", "libx264", "-g", "5", tmp_path / "all.mp4")
    whole = decode_video(tmp_path / "all.mp4")
    assert len(whole) == sum(counts)
    start = 0
    for count in counts:
        span = Span(start_s=start / 10, end_s=(start + count) / 10)
        stored = transcode(tmp_path / "all.mp4", TranscodeSettings(short_side=None, jpeg_quality=98), span=span)
        assert (stored.source_frames, stored.frame_numbers) == (count, tuple(range(count)))
        assert stored.timestamps_s == pytest.approx(np.arange(count) / 10, abs=1e-6)
        assert np.abs(pictures(stored, "frames").astype(int) - whole[start : start + count]).mean() < 3
        middle = transcode(tmp_path / "all.mp4", TranscodeSettings(stride=2), span=Span(2, 6, span.start_s, span.end_s))
        assert middle.frame_numbers == (2, 4)
        start += count


@pytest.mark.parametrize(("start", "end"), [(5.0, 6.0), (0.6, 9.0)])
def test_a_part_that_the_file_does_not_have_is_named(videos, start, end):
    with pytest.raises(MediaError, match=r"the clip is .* of a video that ends at 1.20 s") as caught:
        transcode(videos["odd.mkv"], TranscodeSettings(), span=Span(start_s=start, end_s=end))
    assert caught.value.reason == "wrong_duration"


def test_motion_and_brightness_are_measured_in_levels(tmp_path):
    grey = "color=c=gray:size=64x48:rate=10:duration=0.5"
    jump = (
        "color=c=black:size=64x48:rate=10:duration=0.2[a];color=c=white:size=64x48:rate=10:duration=0.3[b];[a][b]concat"
    )
    for name, source in {"still": grey, "jump": jump}.items():
        run("-f", "lavfi", "-i", source, "-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv420p", tmp_path / f"{name}.mp4")
    for layout in ("frames", "video"):
        for engine in ("pyav", "ffmpeg"):
            settings = TranscodeSettings(layout=layout, engine=engine)
            still, jumping = (transcode(tmp_path / f"{name}.mp4", settings) for name in ("still", "jump"))
            assert still.brightness == pytest.approx(128, abs=3) and still.change == pytest.approx(0, abs=0.3)
            assert jumping.brightness == pytest.approx([0, 0, 255, 255, 255], abs=3)
            assert jumping.change == pytest.approx([0, 255, 0, 0], abs=4)


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_a_shape_that_no_encoder_takes_is_refused_and_nothing_else(tmp_path, layout):
    run("-f", "lavfi", "-i", "color=size=16x6000:rate=5:duration=0.4", "-c:v", "mpeg4", tmp_path / "tall.mp4")
    with pytest.raises(MediaError) as caught:
        transcode(tmp_path / "tall.mp4", TranscodeSettings(layout=layout))
    assert caught.value.reason == "too_large" and "16x6000" in caught.value.message
