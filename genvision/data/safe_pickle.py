"""Pickles of arrays in plain containers, read without running anything that is in them.

A pickle may name any function of Python and have it called. Here it gets plain containers, text and numbers; what NumPy writes of its
arrays is only noted and put together by us; every other name is refused. Long arrays stay in the file and are memory-mapped where it
holds their bytes as they are, which is so but for protocols 0 to 2 of Python 3: the 1.5 GB of a downsampled ImageNet file are not read.
"""

import mmap
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

MAPPED_BYTES = 1 << 20
"""Arrays of at least this many bytes are memory-mapped."""


def load_pickle(path: Path) -> Any:
    """What the pickle holds: dictionaries with text as keys, lists, tuples, numbers, text, bytes, and arrays of numbers.

    Arrays are found as the whole, or as values in a dictionary or in one inside it; they are read-only.

    Raises:
        UnpicklingError: it is damaged, cut off, or names anything but NumPy's arrays and numbers.
    """
    try:
        return _plain(_ArrayUnpickler(cast(Any, _MappedFile(path)), encoding="bytes").load(), depth=2)
    except pickle.UnpicklingError:
        raise
    except EOFError as error:
        raise pickle.UnpicklingError("it is cut off") from error
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError, MemoryError, struct.error) as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict) and depth:
        # Python 2 wrote keys as bytes
        return {_text(key): _plain(entry, depth - 1) for key, entry in value.items()}
    return value


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Dtype:
    """What a pickle says of the type of an array; only numbers are taken."""

    def __init__(self, name: str | bytes, *_flags: Any) -> None:
        self.name = _text(name)
        if not re.fullmatch(r"[<>|=]?[biuf]\d", self.name):
            raise ValueError(f"its arrays are of type {self.name}, not of numbers")
        self.dtype = np.dtype(self.name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = np.dtype(_text(state[1]) + self.name.lstrip("<>|="))


class _Array:
    """What a pickle says of an array: type and shape come after it, as its state."""

    def __init__(self, *_prototype: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, content = state
        self.array = _array(content, dtype, shape, "F" if is_fortran else "C")


def _array(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    flat = np.frombuffer(content, dtype.dtype)
    flat.flags.writeable = False
    return flat.reshape(shape, order=order)


def _array_in_band(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """An array as protocol 5 writes it."""
    array = _Array()
    array.array = _array(content, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.dtype, count=1)[0].item()


def _encode(text: str, _encoding: Any) -> bytes:
    return text.encode("latin1")


_ALLOWED: dict[str, dict[str, Any]] = {
    "multiarray": {"_reconstruct": _Array, "scalar": _scalar},
    "numeric": {"_frombuffer": _array_in_band},
    "numpy": {"ndarray": "ndarray", "dtype": _Dtype},  # the class ndarray is only named, never called
    "_codecs": {"encode": _encode},  # how Python 3 writes bytes in protocol 2
}


# Python's own class instead of the faster one in C: it takes long strings as its file gives them, here without a copy
class _ArrayUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def _load_bytes_as_they_are(self: Any) -> None:
        self.append(self.read(struct.unpack("<Q", self.read(8))[0]))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytes_as_they_are  # protocol 5 would copy them

    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get(module.removeprefix("numpy.core.").removeprefix("numpy._core."), {})
        if name not in known:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return known[name]


class _MappedFile:
    """A file whose long reads are views of it, not copies."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.readline = self.content.readline

    def read(self, size: int) -> bytes | memoryview:
        start = self.content.tell()
        if start + size > len(self.content):
            raise EOFError
        if size < MAPPED_BYTES:
            return self.content.read(size)
        self.content.seek(size, os.SEEK_CUR)
        return memoryview(self.content)[start : start + size]
