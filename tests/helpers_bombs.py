"""Containers that promise or ask for far more than they hold: literal bytes, or a good file with a field patched."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.helpers_hostile import box
from tests.helpers_media import make_video

HOUR = 3600
SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def make_bombs(folder: Path) -> list[Path]:
    """A file for each case, named after it."""
    mp4 = make_video(folder / "good.mp4", frames=20, options=["-movflags", "+faststart"])
    last = make_video(folder / "last.mp4", frames=20)
    mkv = make_video(folder / "good.mkv", frames=20)
    avi = make_video(folder / "good.avi", frames=20)
    large = make_video(folder / "64 megapixels.mp4", frames=1, size="16384x3904", options=["-preset", "ultrafast"])
    made = [large]
    for suffix, cases in (
        (".mp4", _mp4_bombs(mp4) | {"a million frames in one place": _one_place(last, 1_000_000)}),
        (".mkv", _mkv_bombs(mkv)),
        (".avi", _avi_bombs(avi)),
    ):
        for name, data in cases.items():
            path = folder / f"{name}{suffix}"
            path.write_bytes(data)
            made.append(path)
    return made


def _mp4_bombs(good: Path) -> dict[str, bytes]:
    size_16k = struct.pack(">II", 16384 << 16, 16384 << 16)
    start = box(b"ftyp", b"isom")
    text = box(b"udta", box(b"meta", bytes(4) + box(b"ilst", box(b"\xa9nam", box(b"data", bytes(20 << 20))))))
    return {
        "16k x 16k in the track header": _patched(good, b"tkhd", 76, size_16k),
        "16k x 16k in the codec header": _patched(good, b"avc1", 24, struct.pack(">HH", 16384, 16384)),
        "a million frames claimed": _patched(good, b"stsz", 8, struct.pack(">I", 1_000_000)),
        "four billion frames claimed": _patched(good, b"stsz", 8, struct.pack(">I", 0xFFFFFFFF)),
        "no time base": _patched(good, b"mdhd", 12, struct.pack(">I", 0)),
        "ten hours claimed": _patched(good, b"mdhd", 16, struct.pack(">I", 10 * HOUR * 12288)),
        "a thousand streams": _many_streams(good, 1000),
        "5,000 boxes deep": start + b"".join(struct.pack(">I", 1 << 20) + b"moov" for _ in range(5000)),
        "20 MiB of title": start + box(b"moov", text),
        "a box of 4 GiB": start + struct.pack(">I", 0xFFFFFFFF) + b"moov" + bytes(64),
        "a box of 8 EiB": start + struct.pack(">I", 1) + b"moov" + struct.pack(">Q", (1 << 63) - 1) + bytes(64),
        "a frame of 2 GiB": _patched(good, b"stsz", 12, struct.pack(">I", 0x7FFFFFF0)),
    }


def _mkv_bombs(good: Path) -> dict[str, bytes]:
    data = good.read_bytes()
    segment, cluster_at = data.index(SEGMENT), data.index(CLUSTER)
    # The segment's size, eight bytes in ffmpeg's files, becomes "unknown".
    head = data[: segment + 4] + b"\x01" + b"\xff" * 7 + data[segment + 12 : cluster_at]
    at = head.index(b"\x44\x89\x88")  # the declared duration, made void
    head = head[:at] + b"\xec\x89" + bytes(9) + head[at + 11 :]
    # Lacing: one block holds 256 frames of one byte each, and there are 20,000 such blocks, 21 s apart.
    laced = b"\x04" + b"\xff" + bytes(256)  # fixed-size lacing, number of frames - 1
    blocks = b"".join(
        _cluster(21_334 * number, b"\xa3" + _vint(3 + len(laced)) + b"\x81\0\0" + laced) for number in range(20_000)
    )
    # A cluster that nests groups of groups.
    nested = b"".join(b"\xa0" + _vint(1 << 20) for _ in range(5000))
    return {
        "five million laced frames": head + blocks,
        "5,000 groups deep": head + CLUSTER + _vint(len(nested)) + nested,
        "a block of 4 GiB": head + CLUSTER + b"\x01" + b"\xff" * 7 + b"\xe7\x81\x00\xa3" + _vint(0xFFFFFFFF),
    }


def _avi_bombs(good: Path) -> dict[str, bytes]:
    data = good.read_bytes()
    index = data.index(b"idx1")
    entry = b"00dc" + struct.pack("<III", 0x10, 4, 8)
    return {
        "four billion frames claimed in avi": _patched(good, b"strh", 36, struct.pack("<I", 0xFFFFFFFF)),
        "a million entries of one frame": data[:index]
        + b"idx1"
        + struct.pack("<I", 16 * 1_000_000)
        + entry * 1_000_000,
    }


def _patched(good: Path, kind: bytes, offset: int, value: bytes) -> bytes:
    """The file with bytes replaced at `offset` from the end of the first `kind`."""
    data = bytearray(good.read_bytes())
    at = data.index(kind) + 4 + offset
    data[at : at + len(value)] = value
    return bytes(data)


def _one_place(good: Path, count: int) -> bytes:
    """The first frame of the file (index last), said to come `count` times, each time from the same bytes."""
    data = good.read_bytes()
    at = data.index(b"moov") - 4
    offset = data.index(b"mdat") + 4
    size = int.from_bytes(data[data.index(b"stsz") + 16 : data.index(b"stsz") + 20], "big")
    tables = {
        b"stts": struct.pack(">IIII", 0, 1, count, 1024),
        b"stsz": struct.pack(">III", 0, size, count),
        b"stsc": struct.pack(">IIIII", 0, 1, 1, 1, 1),
        b"stco": struct.pack(">II", 0, count) + struct.pack(">I", offset) * count,
        b"mdhd": bytes(12) + struct.pack(">II", 12288, count * 1024) + bytes(4),
    }
    return data[:at] + _rebuilt(data[at:], tables, without=(b"ctts", b"stss", b"edts", b"sgpd", b"sbgp"))


def _rebuilt(data: bytes, contents: dict[bytes, bytes], *, without: tuple[bytes, ...]) -> bytes:
    """The boxes with other contents here and there, their parents' sizes adjusted."""
    made, at = b"", 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + size]
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            content = _rebuilt(content, contents, without=without)
        made += b"" if kind in without else box(kind, contents.get(kind, content))
        at += size
    return made


def _many_streams(good: Path, count: int) -> bytes:
    data = good.read_bytes()
    moov, trak = data.index(b"moov") - 4, data.index(b"trak") - 4
    track = data[trak : trak + int.from_bytes(data[trak : trak + 4], "big")]
    return data[:moov] + box(b"moov", data[moov + 8 : trak] + track * count) + data[data.index(b"mdat") - 4 :]


def _cluster(time_ms: int, content: bytes) -> bytes:
    content = b"\xe7\x84" + struct.pack(">I", time_ms) + content
    return CLUSTER + _vint(len(content)) + content


def _vint(value: int) -> bytes:
    """An EBML size of eight bytes."""
    return (1 << 56 | value).to_bytes(8, "big")
