"""Pictures joined into a video: every one as it was, and what cannot be joined is a typed refusal."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from infra.media import MediaError, scan
from infra.media_decode import decode_video
from infra.media_pictures import Pictures, join_pictures


def frames(number: int, *, size: tuple[int, int] = (50, 75)) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(number)]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(50, 75), (84, 84), (17, 33)])
def test_arrays_and_pngs_come_back_to_the_last_level(tmp_path, size):
    images = frames(7, size=size)
    for kind in (images, [png(image) for image in images]):
        join_pictures(Pictures(kind, 29.97), tmp_path / "a.mov")
        assert np.array_equal(decode_video(tmp_path / "a.mov"), np.stack(images))
        assert scan(tmp_path / "a.mov").timestamps_s == pytest.approx(np.arange(7) / 29.97, abs=1e-3)


def test_jpegs_are_copied_and_never_encoded_again(tmp_path):
    images = [simplejpeg.encode_jpeg(image, quality=90) for image in frames(5)]
    join_pictures(Pictures(images, 10), tmp_path / "a.mov")
    stored = (tmp_path / "a.mov").read_bytes()
    assert all(image in stored for image in images)


def test_the_hash_is_of_the_content_alone(tmp_path):
    images = frames(4)
    first = join_pictures(Pictures(images, 10), tmp_path / "a.mov")
    assert join_pictures(Pictures(iter(images), 25), tmp_path / "b.mov") == first
    assert join_pictures(Pictures(images[::-1], 10), tmp_path / "c.mov") != first


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    data = bytearray(png(frames(1)[0]))
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ([], "empty"),
        ([b"GIF89a........................"], "not_video"),
        ([frames(1)[0], frames(1)[0][:40]], "short_decode"),
        ([frames(1)[0].astype(np.float32)], "not_video"),
        ([b"\xff\xd8\xff\xe0 cut"], "truncated"),
        ([claimed(0, 0)], "too_large"),
        ([claimed(100_000, 100_000)], "too_large"),
        ([claimed(2**31 + 1, 1)], "too_large"),
    ],
)
def test_what_cannot_be_joined_says_why(tmp_path, kind, reason):
    with pytest.raises(MediaError) as caught:
        join_pictures(Pictures(kind, 10), tmp_path / "a.mov")
    assert caught.value.reason == reason and str(tmp_path) not in str(caught.value)
