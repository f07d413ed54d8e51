"""A bounded folder of Arrow tables that all processes of a machine fill and map together.

Workers and ranks draw from the same window of the data, so each needs nearly every part of it: without a common place each would fetch
all of them over the network, and hold them in memory of its own. A table is written once, under a lock, and read by memory map.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from genvision.data.array_files import write_whole
from genvision.data.sources import one_line
from genvision.errors import UserError

NUM_LOCKS = 64
"""Lock files of a folder; tables whose names fall on the same one wait for each other."""
WRITING_SECONDS = 3600
"""A `.part` file that is younger is being written by another process; an older one was left behind."""


class SharedTables:
    """Tables by name in a folder of at most `max_bytes` (or one table); those that were opened longest ago make room for new ones.

    Picklable, and safe in forked workers: what is kept open are maps of whole files that never change.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._mapped: OrderedDict[str, Any] = OrderedDict()
        self.mapped_bytes = 0
        """What this process keeps mapped, bounded as the folder is."""

    def get(self, name: str, read: Callable[[], Any]) -> Any:
        """The table of a name; `read()` makes it if no process has yet, and reports its own troubles as UserError.

        Raises:
            UserError: the folder cannot be written.
        """
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        path = self.folder / f"{name}.arrow"
        try:
            while (table := _map(path)) is None:  # twice only if another process needed the room at this very moment
                self._add(path, read)
        except OSError as error:
            why = error.strerror or one_line(error)
            raise UserError(
                f"{self.folder}: cannot be written ({why}); free up to {self.max_bytes / 1e9:.1f} GB there, "
                "or set GENVISION_CACHE to a folder on a disk with that much room"
            ) from error
        self._mapped[name] = table
        self.mapped_bytes += table.nbytes
        while self.mapped_bytes > self.max_bytes and len(self._mapped) > 1:
            self.mapped_bytes -= self._mapped.popitem(last=False)[1].nbytes
        return table

    def remove(self, name: str) -> None:
        """Delete a table, so that it is made again."""
        table = self._mapped.pop(name, None)
        self.mapped_bytes -= 0 if table is None else table.nbytes
        with suppress(OSError):  # a folder that may only be read: it stays as it is
            (self.folder / f"{name}.arrow").unlink(missing_ok=True)

    def _add(self, path: Path, read: Callable[[], Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{zlib.crc32(path.name.encode()) % NUM_LOCKS}.lock"):
            if path.exists():  # another process was faster
                return
            table = read()
            write_whole(path, lambda file: _write(table, file))
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        """Delete what was opened longest ago, remains of interrupted writes included."""
        found, now = [], time.time()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process makes room as well
                    stat = entry.stat()
                    in_use = entry.name.endswith(".part") and stat.st_mtime > now - WRITING_SECONDS
                    if not in_use and not entry.name.endswith(".lock"):
                        found.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.max_bytes and path != newest:
                path.unlink(missing_ok=True)  # who has it mapped keeps it
                total -= size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict(), "mapped_bytes": 0}


def _write(table: Any, file: Any) -> None:
    import pyarrow.ipc  # type: ignore[import-untyped]

    with pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _map(path: Path) -> Any:
    """A table without a copy; None if there is none."""
    import pyarrow
    import pyarrow.ipc

    try:
        os.utime(path)  # the time of its last opening
    except OSError:
        if not os.access(path, os.R_OK):  # it is not there, or is in a folder that may only be read
            return None
    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except FileNotFoundError:
        return None
    except pyarrow.ArrowInvalid:  # a disk that lost power may keep a name without the content
        path.unlink(missing_ok=True)
        return None
