"""Files that are not what they say, and damaged ones: refused with a reason, nothing fetched, nothing short."""

import subprocess
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from infra.media import MediaError, probe, scan
from infra.media_decode import decode_span
from infra.media_transcode import TranscodeSettings, transcode
from tests.faults import bombs, damaged_media, hostile_containers
from tests.helpers_damage import KINDS
from tests.helpers_hostile import hostile_texts, watched_server
from tests.helpers_media import make_video


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("good") / "sibling.mp4", frames=20, options=["-movflags", "+faststart"])


def test_scripts_playlists_and_paths_touch_nothing_else(tmp_path):
    """Every row of the table that `python -m tests.faults.hostile_containers` prints."""
    rows = list(hostile_containers.try_all(tmp_path))
    assert len(rows) >= 30
    assert [row.name for row in rows if not row.contained] == []
    reasons = {row.name: {row.outcomes[name] for name in ("pyav", "ffmpeg", "bytes")} for row in rows}
    texts = hostile_texts(tmp_path / "x.mp4", "http://127.0.0.1")
    assert {name: reasons[name] for name in texts} == {name: {"hostile_container"} for name in texts}
    assert reasons["text"] == reasons["page"] == reasons["elf"] == {"not_video"}


def test_the_watchers_of_that_table_see_what_happens(good):
    watch = hostile_containers.OpenWatch(good)
    assert watch.count() == 0
    probe(good)
    assert watch.count() >= 1
    with watched_server() as (address, seen):
        with pytest.raises(urllib.error.HTTPError), urllib.request.urlopen(f"{address}/a.ts"):
            pass
        assert "/a.ts" in seen


def test_no_demuxer_reaches_the_network(good, tmp_path, monkeypatch):
    """The second guard alone: with scripts and playlists let through, their addresses are still refused."""
    monkeypatch.setattr("infra.media._check_signature", lambda source: None)
    monkeypatch.setattr("infra.media.DEMUXERS", "mov,concat,hls,mpegts")
    with watched_server() as (address, seen):
        for name in ("playlist-http", "script-http"):
            path = tmp_path / f"{name}.mp4"
            path.write_bytes(hostile_texts(good, address)[name])
            for source in (path, path.read_bytes()):
                with pytest.raises(MediaError):
                    scan(source)
        assert seen == []


def test_a_damaged_video_is_never_accepted_short(tmp_path):
    """A part of what `python -m tests.faults.damaged_media` tries."""
    mutants = damaged_media.make_mutants(tmp_path, list(KINDS), 240, seed=7)
    results = damaged_media.decode_all(mutants)
    counts = Counter(result.outcome for result in results)
    assert set(counts) == {"rejected", "whole"}, counts
    assert counts["rejected"] >= 120


def test_what_dies_or_hangs_in_that_table_is_counted(tmp_path, monkeypatch):
    mutants = damaged_media.make_mutants(tmp_path, list(KINDS), 4, seed=0)
    monkeypatch.setattr(damaged_media, "HANG_S", 15.0)
    monkeypatch.setenv("FOREFRAME_FAULT", f"media.damaged@{mutants[1].path.name}")
    assert [result.outcome for result in damaged_media.decode_all(mutants)].count("crash") == 1
    monkeypatch.setenv("FOREFRAME_FAULT_ACTION", "hang")
    assert [result.outcome for result in damaged_media.decode_all(mutants)].count("hang") == 1


def test_missing_pictures_are_a_short_decode(good, tmp_path):
    """Packets that hold only filler data: stored and declared, yet no picture comes out."""
    data = bytearray(good.read_bytes())
    start = data.index(b"mdat") + 4
    units, position = [], start
    while position + 4 < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        units.append((position + 4, length))
        position += 4 + length
    for offset, length in units[-6:]:
        data[offset : offset + length] = b"\x0c" + b"\xff" * (length - 2) + b"\x80"
    path = tmp_path / "filler.mp4"
    path.write_bytes(data)
    for engine in ("pyav", "ffmpeg"):
        with pytest.raises(MediaError) as caught:
            transcode(path, TranscodeSettings(engine=engine))
        assert caught.value.reason == "short_decode"
        assert "of 20 stored frames" in caught.value.message


def test_pictures_the_decoder_leaves_out_without_a_word_are_missed(tmp_path):
    """MPEG-4 pictures marked "not coded": no error, no picture."""
    path = make_video(tmp_path / "skipped.mp4", frames=10, codec="mpeg4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [entry.pos for entry in container.streams.video[0].index_entries]
    for place in places[-2:]:
        data[place : place + 12] = not_coded(bytes(data[place : place + 12]))
    path.write_bytes(data)
    assert scan(path).num_frames == 10
    with pytest.raises(MediaError) as caught:
        transcode(path, TranscodeSettings())
    assert caught.value.reason == "short_decode"


def test_pictures_missing_at_the_end_are_missed(good):
    timeline = scan(good)
    longer = replace(timeline, pts=np.append(timeline.pts, timeline.pts[-1] + 1000))
    with pytest.raises(MediaError, match="20 of 21"):
        list(decode_span(good, longer))


def not_coded(head: bytes) -> bytes:
    """Clear `vop_coded`: start code, 2 bits of type, seconds in unary, marker, 4 bits of time (12 fps), marker, it."""
    assert head[:4] == b"\x00\x00\x01\xb6"
    bits = f"{int.from_bytes(head[4:], 'big'):0{8 * len(head[4:])}b}"
    at = bits.index("0", 2) + 1 + 1 + 4 + 1
    assert bits[at] == "1"
    return head[:4] + int(f"{bits[:at]}0{bits[at + 1 :]}", 2).to_bytes(len(head) - 4, "big")


def test_messages_hold_no_path(good, tmp_path):
    """They go into receipts, which must be equal wherever the corpus lies."""
    path = tmp_path / "cut.mp4"
    path.write_bytes(good.read_bytes()[:3000])
    for engine in ("pyav", "ffmpeg"):
        with pytest.raises(MediaError) as caught:
            transcode(path, TranscodeSettings(engine=engine))
        assert str(tmp_path) not in caught.value.message and "cut.mp4" not in caught.value.message


@pytest.mark.parametrize("engine", ["pyav", "ffmpeg"])
def test_bombs_cost_little(tmp_path, engine):
    """Every row of the table that `python -m tests.faults.bombs` prints: less than 512 MiB and 5 seconds each."""
    costs = {cost.name: cost for cost in bombs.measure_all(tmp_path, engine=engine)}
    assert len(costs) >= 12
    assert [cost for cost in costs.values() if not cost.cheap] == []
    refused = {Path(name).stem for name, cost in costs.items() if cost.answer == "too_large"}
    assert {
        "64 megapixels",
        "a thousand streams",
        "five million laced frames",
        "a million frames in one place",
    } <= refused
    assert costs["ten hours claimed.mp4"].answer == "wrong_duration"
    assert {cost.answer for cost in costs.values()} - {"20 frames", "too_large", "wrong_duration"} <= {
        *("truncated", "bad_timestamps", "no_video_stream", "decode_error", "short_decode")
    }


def test_ffmpeg_is_told_the_same_guards(good):
    """The program refuses what the library refuses, with our arguments and nothing else."""
    from infra.media_ffmpeg import FfmpegJob, planes_command

    argv = planes_command(FfmpegJob(good, scan(good), (96, 64), (0, 20)))
    script = good.parent / "script.mp4"
    script.write_text(f"ffconcat version 1.0\nfile {good.name}\n")
    hostile = [part.replace(str(good), str(script)) for part in argv]
    assert hostile != argv
    assert subprocess.run(argv, capture_output=True, check=True).stdout != b""
    assert subprocess.run(hostile, capture_output=True, cwd=good.parent, check=False).returncode != 0
