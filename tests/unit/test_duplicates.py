"""Clips that look alike: found whatever their number, never confused with ones that do not."""

import shutil
import subprocess
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.media_fingerprint import BITS, fingerprint
from infra.media_transcode import Span
from ingest.duplicates import NearDuplicates
from tests.helpers_media import ffmpeg, make_video


def hexadecimal(value: int) -> str:
    return f"{value:0{BITS // 4}x}"


def flipped(value: int, bits: int, random: Random) -> int:
    for place in random.sample(range(BITS), bits):
        value ^= 1 << place
    return value


@given(st.integers(0, 64), st.integers(0, 10**6))
def test_the_search_finds_exactly_what_comparing_all_pairs_finds(max_bits, seed):
    random = Random(seed)
    originals = [random.getrandbits(BITS) for _ in range(6)]
    near = [flipped(random.choice(originals), random.randint(0, 80), random) for _ in range(12)]
    search, kept = NearDuplicates(max_bits), []
    for number, value in enumerate(originals + near):
        distances = [(value ^ other).bit_count() for _, other in kept]
        expected = next((place for place, distance in enumerate(distances) if distance <= max_bits), None)
        found = search.find_or_add(hexadecimal(value), str(number))
        if expected is None:
            assert found is None
            kept.append((str(number), value))
        else:
            assert found == (kept[expected][0], distances[expected])


def difference(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_recompression_changes_few_bits_and_another_scene_many(tmp_path):
    original = make_video(tmp_path / "a.mp4", frames=24, size="192x128")
    squeezed = tmp_path / "b.webm"
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-i", original, "-vf", "scale=128:96,eq=brightness=0.05"]
    subprocess.run([*argv, "-c:v", "libvpx", "-b:v", "300k", squeezed], check=True, timeout=60)
    other = tmp_path / "c.mp4"
    source = "mandelbrot=size=192x128:rate=12:start_scale=0.3"
    argv = [ffmpeg(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", source, "-frames:v", "24", "-c:v", "libx264"]
    subprocess.run([*argv, "-pix_fmt", "yuv420p", other], check=True, timeout=60)
    looks = [fingerprint(path) for path in (original, squeezed, other)]
    assert all(len(look) == BITS // 4 for look in looks)
    assert difference(looks[0], looks[1]) < 26
    assert difference(looks[0], looks[2]) > 60


def test_a_part_looks_like_itself(tmp_path):
    whole = make_video(tmp_path / "a.mp4", frames=24, size="192x128", fps=12)
    head = make_video(tmp_path / "head.mp4", frames=12, size="192x128", fps=12)
    shutil.copy(head, tmp_path / "copy.mp4")
    assert fingerprint(tmp_path / "copy.mp4") == fingerprint(head)
    assert difference(fingerprint(whole, span=Span(end_s=1.0)), fingerprint(head)) < 12


@pytest.mark.parametrize("value", ["0" * 64, "f" * 64])
def test_the_same_look_twice_is_found(value):
    search = NearDuplicates(0)
    assert search.find_or_add(value, "a") is None
    assert search.find_or_add(value, "b") == ("a", 0)
