"""Files that a process keeps open to read ranges of their bytes: a bounded number, whatever the number of data sets and shards.

They are read at places that are named (`os.pread`), so a forked process may use those of its parent: there is no position to share.
"""

import os
from collections.abc import Callable
from functools import lru_cache

MAX_OPEN = 128
"""Most systems let a process have 1,024 in all."""


class OpenFile:
    """A file descriptor that closes with its last user: another thread may drive it out while it is read."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def num_bytes(self) -> int:
        """As they are now."""
        return os.fstat(self.number).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of the process the name `os` may be gone
        close(self.number)


@lru_cache(maxsize=MAX_OPEN)
def open_file(path: str, size: int, version: str) -> OpenFile:
    """A file as it was listed; another size or version is another file of the same name, and is opened anew."""
    return OpenFile(os.open(path, os.O_RDONLY))
