"""The one message in RLDS files, `tf.train.Example`: names to lists of bytes, floats or integers.

    Example { 1: Features { 1: repeated entry { 1: name, 2: Feature { 1: BytesList | 2: FloatList | 3: Int64List } } } }
    each list { 1: repeated value }

Read without a schema compiler, strictly: whatever a writer of these messages would not write is an `InputError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
KINDS = {1: "bytes", 2: "floats", 3: "integers"}


@dataclass(frozen=True)
class Feature:
    """One list of values, decoded when asked for. `kind` is "" for an empty feature."""

    name: str
    kind: str
    data: memoryview

    def bytes_list(self) -> list[bytes]:
        """The values; `InputError` unless they are bytes."""
        self._require("bytes")
        return [bytes(value) for value in self._values(BYTES)]

    def num_bytes_values(self) -> int:
        """How many values of bytes there are, none of them copied."""
        self._require("bytes")
        return sum(1 for _ in self._values(BYTES))

    def floats(self) -> npt.NDArray[np.float32]:
        """(N,) values; `InputError` unless they are floats."""
        self._require("floats")
        packed = b"".join(value for value in self._values(BYTES, FIXED32) if not isinstance(value, int))
        if len(packed) % 4:
            raise self._malformed(f"{len(packed)} bytes of floats")
        return np.frombuffer(packed, "<f4").astype(np.float32)

    def integers(self, limit: int | None = None) -> list[int]:
        """The first `limit` values, or all; `InputError` unless they are integers."""
        self._require("integers")
        found: list[int] = []
        for value in self._values(BYTES, VARINT):
            if isinstance(value, int):
                found.append(_signed(value))
                continue
            at = 0
            while at < len(value) and (limit is None or len(found) < limit):
                number, at = _varint(value, at)
                found.append(_signed(number))
        return found if limit is None else found[:limit]

    def _values(self, *wires: int) -> Iterator[memoryview | int]:
        for number, wire, value in _fields(self.data):
            if number != 1 or wire not in wires:
                raise self._malformed(f"field {number} of type {wire}")
            yield value

    def _require(self, kind: str) -> None:
        if self.kind not in (kind, ""):
            raise InputError(f"{self.name} holds {self.kind}, not {kind}.")

    def _malformed(self, what: str) -> InputError:
        return InputError(f"{self.name} is malformed: {what}.")


def parse_example(content: bytes) -> dict[str, Feature]:
    """Name -> feature, values not decoded yet. Raises `InputError` when `content` is no such message."""
    features: dict[str, Feature] = {}
    for body in _messages(memoryview(content), {1}):
        for entry in _messages(body[1], {1}):
            name, feature = _entry(entry[1])
            if name in features:
                raise InputError(f"the record has the feature {name!r} twice.")
            features[name] = feature
    return features


def _entry(data: memoryview) -> tuple[str, Feature]:
    parts = dict(_messages(data, {1, 2}))
    try:
        name = bytes(parts.get(1, b"")).decode()
    except UnicodeDecodeError:
        raise InputError("the record has a feature whose name is not UTF-8.") from None
    lists = list(_messages(parts.get(2, memoryview(b"")), set(KINDS)))
    if len(lists) > 1:
        raise InputError(f"{name} is malformed: {len(lists)} lists of values.")
    kind, values = lists[0] if lists else (0, memoryview(b""))
    return name, Feature(name, KINDS.get(kind, ""), values)


def _messages(data: memoryview, numbers: set[int]) -> Iterator[tuple[int, memoryview]]:
    for number, wire, value in _fields(data):
        if number not in numbers or wire != BYTES or isinstance(value, int):
            raise InputError(f"the record is no tf.train.Example: field {number} of type {wire}.")
        yield number, value


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """(field number, wire type, value) of a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise InputError(f"the record is no tf.train.Example: field {number} of type {wire}.")
        if length > len(data) - at:
            raise InputError(f"the record is cut: {length} bytes are due where {len(data) - at} are left.")
        yield number, wire, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends) of a number of 7 bits a byte, lowest first."""
    value = 0
    for place in range(MAX_VARINT_BYTES):
        if at + place >= len(data):
            raise InputError("the record is cut: it ends inside a number.")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at + place + 1
    raise InputError("the record holds a number of more than 64 bits.")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
