"""Messages of openpi's websocket convention: msgpack maps whose numpy arrays are maps under reserved byte keys.

    array   {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": (2, 3)}
    scalar  {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f8"}

Only booleans, integers and floats become arrays: no objects, no pickle. Needs numpy and msgpack alone.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DATA, DTYPE, SHAPE = b"data", b"dtype", b"shape"
KINDS = "biuf"
NUMBER = re.compile(r"[<>|=]?[biuf](1|2|4|8)")
MAX_AXES = 8
MAX_ITEMS = 4096  # of one list or map
MAX_CONTAINERS = 256  # lists, maps and arrays of one message: few bytes must not become many objects


class WireError(ValueError):
    """A message that is not of the convention; its text is one line for the peer."""


def pack(message: Any) -> bytes:
    """A message as bytes; `WireError` for an array of another kind than booleans, integers or floats."""
    packed: bytes = msgpack.packb(message, default=_to_map)
    return packed


def unpack(data: bytes) -> Any:
    """The message in bytes; arrays are read-only views of it. `WireError` for anything else than one whole message."""
    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS, "max_str_len": len(data), "max_bin_len": len(data)}
    count = _Containers()
    try:
        return msgpack.unpackb(
            data, object_hook=count.map, list_hook=count.list, strict_map_key=False, max_ext_len=0, **limits
        )
    except WireError:
        raise
    # msgpack raises its own errors, and plain ones for bad text, unhashable keys, and nesting beyond its stack.
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WireError(f"not a msgpack message: {reason}") from None


class _Containers:
    """Counts what a message is made of while it is read, and stops at `MAX_CONTAINERS`."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def map(self, value: dict[Any, Any]) -> Any:
        self._take_one()
        return _from_map(value)

    def list(self, value: list[Any]) -> list[Any]:
        self._take_one()
        return value

    def _take_one(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise WireError(f"more than {MAX_CONTAINERS} lists and maps in one message")


def _to_map(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in KINDS:
            raise WireError(f"arrays of {value.dtype} cannot be sent")
        if isinstance(value, np.ndarray):
            return {ARRAY: True, DATA: value.tobytes(), DTYPE: value.dtype.str, SHAPE: value.shape}
        return {SCALAR: True, DATA: value.item(), DTYPE: value.dtype.str}
    raise WireError(f"a {type(value).__name__} cannot be sent")


def _from_map(value: dict[Any, Any]) -> Any:
    if ARRAY in value:
        dtype, shape, data = _dtype(value.get(DTYPE)), value.get(SHAPE), value.get(DATA)
        if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_is_size(side) for side in shape):
            raise WireError(f"an array's shape is {_shown(shape)}")
        if not isinstance(data, bytes) or len(data) != dtype.itemsize * math.prod(shape):
            raise WireError(f"an array's data does not fill {dtype} {tuple(shape)}")
        return np.frombuffer(data, dtype).reshape(shape)
    if SCALAR in value:
        data = value.get(DATA)
        if not isinstance(data, bool | int | float):
            raise WireError("a scalar's data is not a number")
        try:
            return _dtype(value.get(DTYPE)).type(data)
        except OverflowError:
            raise WireError(f"a scalar does not fit {value.get(DTYPE)}") from None
    return value


def _dtype(text: Any) -> np.dtype[Any]:
    try:
        # numpy reads a small language here, so only what names one number goes to it.
        if isinstance(text, str) and NUMBER.fullmatch(text):
            return np.dtype(text)
    except TypeError:
        pass
    raise WireError(f"arrays of {_shown(text)} are not taken")


def _is_size(side: Any) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and 0 <= side < 2**31


def _shown(value: Any) -> str:
    return repr(value)[:40]
