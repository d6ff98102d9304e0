"""The wire format against literal bytes, and what it refuses."""

from __future__ import annotations

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.serving.wire import WireError, pack, unpack

# {"a": array([[1, 2]], dtype=uint8)} as openpi's client writes it, byte by byte.
LITERAL = (
    b"\x81\xa1a"  # map of one, key "a"
    b"\x84"  # map of four
    b"\xc4\x0b__ndarray__\xc3"  # bytes key: true
    b"\xc4\x04data\xc4\x02\x01\x02"
    b"\xc4\x05dtype\xa3|u1"
    b"\xc4\x05shape\x92\x01\x02"
)


def test_an_array_is_the_literal_bytes_and_back():
    assert pack({"a": np.array([[1, 2]], np.uint8)}) == LITERAL
    found = unpack(LITERAL)["a"]
    assert found.dtype == np.uint8 and found.tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_arrays_and_scalars_of_numbers_survive(dtype):
    array = np.arange(6).reshape(1, 2, 3).astype(dtype)
    found = unpack(pack({"x": array, "n": array[0, 0, 1], "text": "é", "list": [1, 2.5, None]}))
    assert found["x"].dtype == array.dtype and np.array_equal(found["x"], array)
    assert found["n"] == array[0, 0, 1]
    assert dtype == "float64" or found["n"].dtype == array.dtype  # numpy's float64 is a float of Python's
    assert (found["text"], found["list"]) == ("é", [1, 2.5, None])


def array_map(**changes: object) -> bytes:
    fields = {b"__ndarray__": True, b"data": b"\x00" * 4, b"dtype": "<f4", b"shape": [1]}
    return msgpack.packb(fields | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(("data", "words"), [
    (array_map(dtype="|O"), "arrays of '|O' are not taken"),
    (array_map(dtype="O"), "are not taken"),
    (array_map(dtype="<M8[s]"), "are not taken"),
    (array_map(dtype="f4,f4"), "are not taken"),
    (array_map(dtype=5), "are not taken"),
    (array_map(dtype=","), "are not taken"),  # a syntax error in numpy's own reading of it
    (array_map(dtype="(,f"), "are not taken"),
    (array_map(dtype="f3"), "are not taken"),
    (array_map(shape=[2]), "does not fill"),
    (array_map(shape=[-1]), "shape is"),
    (array_map(shape=[1] * 40), "shape is"),
    (array_map(shape="1"), "shape is"),
    (array_map(shape=[2**31 - 1, 2**31 - 1]), "does not fill"),
    (array_map(data="text"), "does not fill"),
    (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "not a number"),
    (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
    (b"", "not a msgpack message"),
    (b"\xc1", "not a msgpack message"),
    (b"\x91" * 100_000, "not a msgpack message"),  # lists within lists without end
    (b"\xdd\xff\xff\xff\xff", "not a msgpack message"),  # a list that claims four thousand million items
    (msgpack.packb([0] * 5000), "not a msgpack message"),
    (msgpack.packb(msgpack.ExtType(1, b"x")), "not a msgpack message"),
    (b"\x01\x02", "not a msgpack message"),  # two messages
    (b"\xa1\xff", "not a msgpack message"),  # no text
])  # fmt: skip
def test_what_is_not_of_the_convention_is_one_line(data, words):
    with pytest.raises(WireError) as error:
        unpack(data)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_parse_or_be_refused(data):
    with contextlib.suppress(WireError):
        unpack(data)


def test_objects_are_not_sent():
    with pytest.raises(WireError, match="arrays of object"):
        pack(np.array([object()]))
    with pytest.raises(WireError, match="a set cannot be sent"):
        pack({"x": {1}})
