"""Reading, decoding and encoding video in process: frame counts, frame identity, colours, equal bytes."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from infra.media import MediaError, VideoLimits, fit, probe, scan
from infra.media_decode import decode_video
from infra.media_encode import decode_jpeg, encode_jpeg, encode_video
from infra.media_transcode import Span, TranscodeSettings, transcode
from tests.helpers_media import ffmpeg, make_video

KINDS = {
    "b-frames.mp4": {"size": "96x64", "options": ["-bf", "3", "-g", "10"]},
    "vp9-odd.webm": {"size": "75x50", "codec": "libvpx-vp9"},
    "vp8-hidden.webm": {"size": "81x54", "options": ["-auto-alt-ref", "1", "-lag-in-frames", "8"]},
    "mpeg4.avi": {"size": "64x96", "options": ["-bf", "2"]},
    "mpeg4.mp4": {"size": "80x60", "codec": "mpeg4"},
    "open.mkv": {"size": "64x64", "options": ["-g", "6", "-bf", "2", "-x264-params", "open-gop=1"]},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: make_video(folder / name, frames=25, **options) for name, options in KINDS.items()}


def reference_frames(path: Path) -> np.ndarray:
    """What the ffmpeg program decodes, as exact RGB."""
    info = probe(path)
    flags = ["-sws_flags", "bicubic+accurate_rnd+full_chroma_int"]
    argv = [ffmpeg(), "-nostdin", "-loglevel", "error", "-i", str(path), *flags, "-fps_mode", "passthrough"]
    raw = subprocess.run([*argv, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, info.height, info.width, 3)


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_decoded_as_ffmpeg_does(videos, name):
    expected = reference_frames(videos[name])
    found = decode_video(videos[name])
    assert found.shape == expected.shape == (25, *expected.shape[1:])
    difference = np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3))
    assert difference.max() < 4  # another frame differs by far more
    assert np.abs(expected[1:].astype(int) - expected[:-1]).mean(axis=(1, 2, 3)).min() > 6


@pytest.mark.parametrize("name", KINDS)
def test_random_access_gives_the_same_frames_as_reading_all(videos, name):
    frames = decode_video(videos[name])
    indices = [24, 0, 13, 13, 7, 19, 6]
    assert np.array_equal(decode_video(videos[name], indices), frames[indices])
    assert np.array_equal(decode_video(videos[name].read_bytes(), [5, 22]), frames[[5, 22]])


@pytest.mark.parametrize("engine", ["pyav", "ffmpeg"])
@pytest.mark.parametrize("layout", ["frames", "video"])
@pytest.mark.parametrize("name", KINDS)
def test_stored_pictures_show_the_source(videos, name, layout, engine):
    settings = TranscodeSettings(layout=layout, engine=engine, short_side=None, jpeg_quality=95, stride=3)
    stored = transcode(videos[name], settings, span=Span(4, 20))
    expected = reference_frames(videos[name])[4:20:3, : stored.height, : stored.width]
    found = (
        np.stack([decode_jpeg(member) for member in stored.members])
        if layout == "frames"
        else decode_video(stored.members[0])
    )
    assert stored.frame_numbers == (4, 7, 10, 13, 16, 19)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3)).max() < 8
    assert np.abs((found.astype(float) - expected).mean(axis=(0, 1, 2))).max() < 2.5  # no shift of range or matrix
    assert stored.timestamps_s == pytest.approx(np.arange(4, 20, 3) / 12, abs=2e-3)


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_equal_input_gives_equal_bytes_and_the_asked_size(videos, layout):
    settings = TranscodeSettings(layout=layout, short_side=48)
    first, second = (transcode(videos["vp9-odd.webm"], settings) for _ in range(2))
    assert first.members == second.members
    assert (first.width, first.height) == (72, 48)


def test_stored_video_has_short_closed_groups_without_b_frames(videos):
    timeline = scan(transcode(videos["b-frames.mp4"], TranscodeSettings(layout="video")).members[0])
    frame = 1 / 12 / float(timeline.time_base)
    assert np.array_equal(np.round(timeline.keyframes / frame), [0, 8, 16, 24])
    argv = [ffmpeg(), "-nostdin", "-i", "pipe:0", "-vf", "showinfo", "-f", "null", "-"]
    data = transcode(videos["b-frames.mp4"], TranscodeSettings(layout="video")).members[0]
    text = subprocess.run(argv, input=data, capture_output=True, check=True).stderr.decode()
    assert "type:P" in text and "type:B" not in text


def test_rotated_recording_is_stored_upright(videos, tmp_path):
    rotated = tmp_path / "phone.mp4"
    argv = [ffmpeg(), "-nostdin", "-loglevel", "error", "-display_rotation", "90", "-i", str(videos["b-frames.mp4"])]
    subprocess.run([*argv, "-c", "copy", str(rotated)], check=True)
    for engine in ("pyav", "ffmpeg"):
        stored = transcode(rotated, TranscodeSettings(engine=engine, short_side=None, jpeg_quality=95))
        expected = np.rot90(reference_frames(videos["b-frames.mp4"])[7])
        found = decode_jpeg(stored.members[7])
        assert found.shape == expected.shape == (96, 64, 3)
        assert np.abs(found.astype(int) - expected).mean() < 8


def test_full_range_and_bt709_sources_keep_their_colours(tmp_path):
    convert = "scale=out_color_matrix=bt709:out_range=full,format=yuv420p"
    tags = ["-vf", convert, "-colorspace", "bt709", "-color_range", "pc", "-qp", "2"]
    path = make_video(tmp_path / "hd.mp4", frames=4, options=tags)
    stored = transcode(path, TranscodeSettings(short_side=None, jpeg_quality=98))
    found, expected = decode_jpeg(stored.members[2]).astype(float), reference_frames(path)[2]
    assert np.abs((found - expected).mean(axis=(0, 1))).max() < 2.5


def test_encoded_rgb_comes_back(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = [np.stack(np.broadcast_arrays(ramp, ramp[:, None], 5 * index), -1).astype(np.uint8) for index in range(20)]
    assert encode_video(frames, tmp_path / "ramp.mp4", fps=10, crf=8) == 20
    found = decode_video(tmp_path / "ramp.mp4")
    assert np.abs(found.astype(int) - np.stack(frames)).mean() < 3
    assert probe(tmp_path / "ramp.mp4").fps == 10
    assert np.abs(decode_jpeg(encode_jpeg(frames[3], quality=95)).astype(int) - frames[3]).mean() < 3


def test_trimmed_recording_is_whole(videos, tmp_path):
    """An edit list hides frames that are stored: that is no damage."""
    trimmed = tmp_path / "trimmed.mp4"
    argv = [ffmpeg(), "-nostdin", "-loglevel", "error", "-ss", "0.5", "-i", str(videos["b-frames.mp4"]), "-c", "copy"]
    subprocess.run([*argv, str(trimmed)], check=True)
    assert np.array_equal(decode_video(trimmed), decode_video(videos["b-frames.mp4"])[-scan(trimmed).num_frames :])
    assert scan(trimmed).num_frames == 19


@pytest.mark.parametrize(
    "limits", [VideoLimits(max_frame_pixels=96 * 64 - 1), VideoLimits(max_video_pixels=96 * 64 * 24)]
)
def test_limits_are_checked_before_decoding(videos, limits):
    with pytest.raises(MediaError) as caught:
        transcode(videos["b-frames.mp4"], TranscodeSettings(limits=limits))
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((640, 480), 256, (342, 256)),
        ((361, 240), 256, (386, 256)),
        ((240, 427), 256, (256, 456)),
        ((75, 50), None, (75, 50)),
    ],
)
def test_fit_keeps_the_shape(size, side, expected):
    assert fit(*size, side) == expected


def test_not_a_jpeg_is_a_typed_error():
    with pytest.raises(MediaError) as caught:
        decode_jpeg(b"\xff\xd8\xff nonsense")
    assert caught.value.reason == "decode_error"
