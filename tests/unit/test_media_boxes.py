"""Declared durations against frame times: a claim of ten hours is refused, and no good file is."""

import struct
import subprocess

import pytest

from infra.media import MediaError, scan
from infra.media_boxes import find_contradiction
from tests.helpers_hostile import outside_data
from tests.helpers_media import ffmpeg, make_video

LONG_SOUND = ["-f", "lavfi", "-i", "sine=duration=9", "-map", "0:v", "-map", "1:a"]
GOOD = {
    "plain.mp4": {},
    "first.mov": {"options": ["-movflags", "+faststart"]},
    "one.mp4": {"frames": 1},
    "two.mp4": {"frames": 2, "fps": 1},
    "slow.mp4": {"frames": 3, "options": ["-vf", "setpts=N*7/TB"]},
    "sound.mp4": {"inputs": LONG_SOUND},
    "sound.mov": {"inputs": LONG_SOUND},
    "variable.mp4": {"frames": 40, "options": ["-vf", "setpts=(N+0.4*sin(N))*N/TB/12", "-fps_mode", "vfr"]},
    "b-frames.mp4": {"frames": 30, "options": ["-bf", "3"]},
    "late.mp4": {"options": ["-vf", "setpts=PTS+5/TB", "-copyts"]},
    "pieces.mp4": {"options": ["-movflags", "+frag_keyframe+empty_moov"]},
    "pieces-index.mp4": {"options": ["-movflags", "+frag_keyframe"]},
    "no-edits.mp4": {"options": ["-use_editlist", "0"]},
    "ticks.mov": {"options": ["-video_track_timescale", "90000", "-movie_timescale", "600"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("good")


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_not_refused(folder, name):
    options = dict(GOOD[name])
    path = make_video(folder / name, **options)
    assert scan(path).num_frames == options.get("frames", 12)
    assert scan(path.read_bytes()).num_frames == options.get("frames", 12)


@pytest.mark.parametrize("bf", [0, 3])
@pytest.mark.parametrize("start", [0.1, 0.5, 1.4, 2.9])
def test_cut_without_encoding_is_good(folder, start, bf):
    options = ["-g", "30", "-bf", str(bf), "-shortest"]
    source = make_video(folder / "long.mp4", frames=60, inputs=LONG_SOUND, options=options)
    for suffix in (".mp4", ".mov"):
        cut = folder / f"cut-{start}{suffix}"
        argv = [ffmpeg(), "-nostdin", "-y", "-loglevel", "error", "-ss", str(start), "-i", str(source), "-t", "1.2"]
        subprocess.run([*argv, "-c", "copy", str(cut)], check=True)
        assert scan(cut).num_frames >= 12


def test_trimmed_in_place_is_good(folder):
    """As phones trim: all frames stay, an edit list shows some of them."""
    path = make_video(folder / "phone.mov", frames=60, options=["-bf", "0", "-movie_timescale", "1000"])
    data = bytearray(path.read_bytes())
    edit = data.index(b"elst") + 12
    struct.pack_into(">Ii", data, edit, 1000, int.from_bytes(data[edit + 4 : edit + 8], "big"))
    struct.pack_into(">I", data, data.index(b"tkhd") + 24, 1000)
    struct.pack_into(">I", data, data.index(b"mvhd") + 20, 1000)
    assert scan(bytes(data)).num_frames == 12


@pytest.mark.parametrize("field", ["mdhd", "mvhd", "elst", "stts"])
@pytest.mark.parametrize("name", ["plain.mp4", "first.mov", "sound.mov"])
def test_a_claim_of_ten_hours_is_refused(folder, field, name):
    data = bytearray(make_video(folder / f"claim-{name}", **GOOD[name]).read_bytes())
    at = data.index(field.encode()) + 4
    if field == "elst":
        data[at + 8 : at + 12] = struct.pack(">I", 36_000_000)  # in milliseconds, or in 44,100ths of a second
    elif field == "stts":
        data[at + 12 : at + 16] = struct.pack(">I", 1 << 24)
    else:
        timescale = int.from_bytes(data[at + 12 : at + 16], "big")
        data[at + 16 : at + 20] = struct.pack(">I", min(36_000 * timescale, 0xFFFFFFF0))
    with pytest.raises(MediaError) as caught:
        scan(bytes(data))
    assert caught.value.reason == ("bad_timestamps" if field == "stts" else "wrong_duration")


def test_an_edit_list_that_hides_frames_and_ends_after_the_last_is_refused(folder):
    data = bytearray(make_video(folder / "edit.mp4", options=["-bf", "0"]).read_bytes())
    edit = data.index(b"elst") + 12
    struct.pack_into(">i", data, edit + 4, 12288 // 2)  # begin half a second later, as long as before
    with pytest.raises(MediaError, match="hides 6 frames") as caught:
        scan(bytes(data))
    assert caught.value.reason == "wrong_duration"


def test_a_frame_far_from_its_place_is_refused(folder):
    data = bytearray(make_video(folder / "shift.mp4", frames=30, options=["-bf", "2"]).read_bytes())
    struct.pack_into(">I", data, data.index(b"ctts") + 12 + 8 * 3 + 4, 12288 * 900)
    with pytest.raises(MediaError, match="from its place in the file") as caught:
        scan(bytes(data))
    assert caught.value.reason == "bad_timestamps"


def test_frames_in_another_file_are_refused(folder):
    good = make_video(folder / "inside.mp4", options=["-movflags", "+faststart"])
    with pytest.raises(MediaError) as caught:
        scan(outside_data(good, "sibling.mp4"))
    assert caught.value.reason == "hostile_container"


def test_nonsense_is_no_contradiction(folder):
    """What cannot be read here is left to libav."""
    data = make_video(folder / "nonsense.mp4").read_bytes()
    for source in (data, b"", bytes(99), *(data[:size] for size in range(0, len(data), 37))):
        assert find_contradiction(source, 1) is None
    assert find_contradiction(data, 77) is None
