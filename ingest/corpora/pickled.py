"""Pickled numpy files read without executing anything: not python's callables, and not numpy's unpickling either.

First every instruction of the pickle must be on a list of those that plain data need. Then the five names that numpy
writes are answered by the stand-ins below, and any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from infra.errors import InputError

MAX_BYTES = 1 << 28
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
INSTRUCTIONS = re.compile(
    "PROTO|FRAME|STOP|MARK|POP|MEMOIZE|(LONG_)?BIN(PUT|GET)|(STACK_)?GLOBAL|REDUCE|BUILD|NONE|NEWTRUE|NEWFALSE|"
    "(BIN)?INT|BININT[12]|LONG[14]?|(BIN)?FLOAT|(SHORT_)?BINUNICODE|BINUNICODE8|UNICODE|(SHORT_)?BINBYTES|BINBYTES8|"
    "EMPTY_(TUPLE|LIST|DICT)|TUPLE[123]?|LIST|APPENDS?|DICT|SETITEMS?"
)
PLAIN_TYPE = re.compile(r"[bifu](1|2|4|8)|O(4|8)?|U\d{1,4}")
FAULTS = (  # what a malformed pickle ends as
    pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError, MemoryError,
    RecursionError,
)  # fmt: skip


def load_object(data: bytes, name: str) -> Any:
    """The one object in an npy file that holds no array: dicts, lists, tuples, str, numbers; arrays within as `Array`.

    Raises `InputError` naming what is on no list, and for a file that is none.
    """
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} has {len(data)} bytes, above {MAX_BYTES}.")
    try:
        stream = io.BytesIO(data)
        shape, _, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
        if shape != () or dtype != np.dtype(object):
            raise InputError(f"{name} holds {dtype} of shape {shape}, not one pickled object.")
        body = data[stream.tell() :]
        _check_instructions(body, name)
        array = _Unpickler(io.BytesIO(body), name).load()
    except FAULTS as error:
        raise InputError(f"{name} is no pickled numpy file: {type(error).__name__}.") from None
    if not isinstance(array, Array) or len(array.values) != 1:
        raise InputError(f"{name} holds no single object.")
    return array.values[0]


class Array:
    """Stand-in for `numpy.ndarray`: one of objects has them in `values`, flat; any other is `numbers`."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.numbers: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, _Type) or not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
            raise pickle.UnpicklingError
        if isinstance(content, list):
            self.values = content
            return
        self.numbers = np.frombuffer(content, kind.dtype()).reshape(shape, order="F" if is_fortran else "C")


class _Type:
    """Stand-in for `numpy.dtype`."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not PLAIN_TYPE.fullmatch(code):
            raise pickle.UnpicklingError
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError
        self._order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """A type of numbers or text; objects have none that bytes could fill."""
        if self._code.startswith("O"):
            raise pickle.UnpicklingError
        return np.dtype(self._order + self._code)


class _Call:
    """A name of the pickle. Calling it is all that can be done with it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _Type):
        raise pickle.UnpicklingError
    (value,) = np.frombuffer(content, kind.dtype())
    return value.item()


def _encode(text: Any, encoding: Any) -> bytes:
    """How python 2's protocol writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError
    return text.encode("latin1")


def _empty_array(*_: Any) -> Array:
    return Array()


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _empty_array,
    ("numpy", "dtype"): _Type,
    ("multiarray", "_reconstruct"): _empty_array,
    ("multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
}
SHORT = {"numpy.core.multiarray": "multiarray", "numpy._core.multiarray": "multiarray"}  # numpy 1 and 2


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, name: str) -> None:
        super().__init__(stream)
        self._file = name

    def find_class(self, module: str, name: str) -> Any:
        found = KNOWN.get((SHORT.get(module, module), name))
        if found is None:
            raise InputError(
                f"{self._file} would call {f'{module}.{name}'[:200]!r}, which no data need.", remedy="Do not trust it."
            )
        return _Call(found)


def _check_instructions(body: bytes, name: str) -> None:
    """Refuses others than those above, and places in the memo that no pickle of that length can fill."""
    for instruction, argument, _ in pickletools.genops(body):
        if not INSTRUCTIONS.fullmatch(instruction.name):
            raise InputError(f"{name} has the pickle instruction {instruction.name}, which no data need.")
        if instruction.name == "LONG_BINPUT" and int(argument or 0) > len(body):
            raise InputError(f"{name} claims {argument} objects in {len(body)} bytes.")
