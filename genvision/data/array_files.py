"""Files that are whole or not there, arrays that grow by rows on disk, and arrays that are opened memory-mapped, many at once.

A file is written under another name, synced, renamed, and its folder is synced: nothing half-written ever has the name.
"""

import json
import os
import socket
import tokenize
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from genvision.errors import UserError

SPARE_FILES = 256
"""Files that a process opens beside those of its data: worker processes, checkpoints, logs."""
DAMAGED_ARRAY = (
    *(OSError, EOFError, ValueError, TypeError, IndexError, SyntaxError, tokenize.TokenError),
    *(OverflowError, MemoryError, RecursionError),
)
"""What numpy raises for damaged files: it reads their headers as Python, and allots what they claim."""


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file by `write(file)`; an old one of that name stays until the new one is whole."""
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            write(file)
            _sync(file)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk its room is wanted
        raise
    _give_name(part, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as a whole."""
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes the file `path`, by a lock beside it; without one, where there can be none, all of them make it."""
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # a folder that cannot be written; a file system without locks
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path.with_suffix(".lock")))
        yield


class GrowingArray:
    """An .npy file that is written row by row, in the memory of one `append`; equal to what `np.save` writes of all rows.

    It has its name after `finish`; `discard` leaves nothing.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row_shape = path, dtype, row_shape
        self.count = 0
        self.file = _part_of(path).open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """`rows` [n, *row_shape] of any number type that fits."""
        assert rows.shape[1:] == self.row_shape, f"{self.path}: rows of shape {rows.shape[1:]} after rows of shape {self.row_shape}"
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.count += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        _sync(self.file)
        self.file.close()
        _give_name(_part_of(self.path), self.path)

    def discard(self) -> None:
        self.file.close()
        _part_of(self.path).unlink()

    def _write_header(self) -> None:
        # numpy leaves room for the largest number of rows, so that the header can be written again when the number is known
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self.file, header)


def open_array(path: Path, shape: tuple[int | None, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A memory-mapped array of an encoded data set.

    Args:
        shape: what its index says; None where any length will do.

    Raises:
        UserError: it is missing, damaged, or not of this shape and type.
    """
    if not path.is_file():
        raise UserError(f"{path}: is missing, but index.json lists it; restore it, or delete the folder and encode again")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED_ARRAY as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: is damaged ({reason}); restore it, or delete the folder and encode again") from error
    fits = len(array.shape) == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise UserError(
            f"{path}: is {array.dtype} {list(array.shape)}, index.json says {dtype} {wanted}; delete the folder and encode again"
        )
    return np.asarray(array)  # still mapped; rows of a plain array are taken faster than those of np.memmap


def allow_open_files(folder: Path, num: int) -> None:
    """Let this process open `num` more files, within what the system lets it have.

    Raises:
        UserError: the system does not.
    """
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sum(1 for _ in Path("/dev/fd").iterdir()) + num + SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"{folder}: its {num} files must be open at once, but this process may open {hard} in all; raise that "
            "(ulimit -Hn, or LimitNOFILE of the service)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")  # folders may be shared between hosts


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _give_name(part: Path, path: Path) -> None:
    part.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
