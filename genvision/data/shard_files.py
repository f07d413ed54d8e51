"""Shards by address, on a local disk or behind any fsspec protocol, and ranges of their bytes.

A shard behind `simplecache::` is copied as a whole when it is first used: into the user's cache folder, or the one that fsspec's own
setting FSSPEC_SIMPLECACHE_CACHE_STORAGE names. All processes and later runs share the copies. (fsspec's own cache would hand one process
a copy that another one has half written.) No file system crosses a fork, and nothing that is open a pickle.
"""

import io
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from genvision.data.array_files import alone, write_whole
from genvision.data.open_files import open_file
from genvision.data.shard_addresses import list_shards
from genvision.data.sources import digest_of, one_line
from genvision.errors import UserError
from genvision.user_cache import user_cache

T = TypeVar("T")
THREADS = 8
READ_AHEAD = 8 << 20
"""Bytes of a request while a remote shard is read from end to end."""
WAITS = (1.0, 5.0, 25.0)
"""Seconds before a failed remote request is sent again."""
_COPIED = "simplecache::"
_NOTHING: Any = (0, None)
"""Stands for what no process has opened yet."""
_EXTRAS = {"https": "http", "s3a": "s3", "az": "abfs", "gs": "gcs"}
"""Protocols whose extra of fsspec has another name."""
_VERSIONS = ("ETag", "etag", "xet_hash", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call that which changes with a file, the surest first."""


class ShardFiles:
    """The files that an address names, in the order of `list_shards`.

    Args:
        address: a path or an fsspec URL, perhaps with wildcards or braces.

    Raises:
        UserError: one is missing, or the address cannot be read.
    """

    def __init__(self, address: str) -> None:
        self.address = address.removeprefix(_COPIED).removeprefix("file://")
        self.is_local = "://" not in self.address and "::" not in self.address
        if self.is_local:
            self.address = str(Path(self.address).expanduser().absolute())
        if "cache::" in self.address:
            raise UserError(f"{address}: of fsspec's caches only simplecache:: is known, in front of all; write {_COPIED}PROTOCOL://PATH")
        self._copies = _copies_folder() if address.startswith(_COPIED) and not self.is_local else None
        self._found = _NOTHING
        self._copied: dict[int, str] = {}
        fs, path = self._filesystem()
        self.paths = self._patiently(address, lambda: list_shards(fs, path, address))
        with ThreadPoolExecutor(THREADS) as pool:
            facts = [*pool.map(self._facts, self.paths)]
        self.sizes = np.array([size for size, _ in facts], dtype=np.int64)
        self.versions = [version for _, version in facts]

    def __len__(self) -> int:
        return len(self.paths)

    def url(self, shard: int) -> str:
        """What to call a shard in a message."""
        return self._url(self.paths[shard])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard.

        Raises:
            UserError: they cannot be had: the shard has changed, or the disk or the network fails.
        """
        if size == 0:
            return b""
        if not self.is_local and self._copies is None:
            return self._read_remote(shard, offset, size)
        try:
            opened = open_file(self._local_path(shard), int(self.sizes[shard]), self.versions[shard])
            data = os.pread(opened.number, size, offset)
            is_whole = len(data) == size and opened.num_bytes == self.sizes[shard]
        except OSError as error:
            raise self._failed(shard, error) from error
        if not is_whole:
            raise self._changed(shard)
        return data

    def stream(self, shard: int) -> BinaryIO:
        """A shard to read from its beginning on, remote ones in large pieces."""
        if not self.is_local and self._copies is None:
            return io.BufferedReader(_RemoteFile(lambda *where: self._read_remote(shard, *where), int(self.sizes[shard])), READ_AHEAD)
        try:
            return Path(self._local_path(shard)).open("rb")
        except OSError as error:
            raise self._failed(shard, error) from error

    def check_unchanged(self, shard: int) -> None:
        """Raises UserError if a shard is not what it was when it was listed."""
        fs, _ = self._filesystem()
        fs.invalidate_cache()
        if self._facts(self.paths[shard]) != (int(self.sizes[shard]), self.versions[shard]):
            raise self._changed(shard)

    def read_beside(self, name: str) -> bytes | None:
        """The file `name` in the folder of the first shard; None if there is none."""
        fs, _ = self._filesystem()
        path = f"{self.paths[0].rpartition('/')[0]}/{name}"

        def read() -> bytes | None:
            try:
                return bytes(fs.cat_file(path))
            except FileNotFoundError:
                return None
            except PermissionError:
                if self.is_local:
                    raise
                return None  # S3's answer for a file that is not there, where one may not list the bucket

        return self._patiently(self._url(path), read)

    def _filesystem(self) -> tuple[Any, str]:
        """The file system of this process, and the address as it knows it: asynchronous ones of fsspec must not cross a fork."""
        process, found = self._found
        if process != os.getpid():
            found = _open_filesystem(self.address)
            self._found = os.getpid(), found
        return found

    def _changed(self, shard: int) -> UserError:
        return UserError(f"{self.url(shard)}: has changed since it was opened; run again, and it is indexed anew")

    def _failed(self, shard: int, error: OSError) -> UserError:
        return UserError(f"{self.url(shard)}: cannot be read ({one_line(error)}); check the disk, then run again")

    def _local_path(self, shard: int) -> str:
        if self._copies is None:
            return self.paths[shard]
        if shard not in self._copied:
            self._copied[shard] = str(self._copy(shard, self._copies))
        return self._copied[shard]

    def _copy(self, shard: int, folder: Path) -> Path:
        url, size = self.url(shard), int(self.sizes[shard])
        copy = folder / f"{digest_of('shard', np.array([url, str(size), self.versions[shard]]))[:32]}.tar"
        if copy.exists():
            return copy
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(copy):
                if not copy.exists():  # another process may have made it meanwhile
                    with io.BufferedReader(_RemoteFile(lambda *where: self._read_remote(shard, *where), size), READ_AHEAD) as source:
                        write_whole(copy, lambda file: shutil.copyfileobj(source, file, READ_AHEAD))
        except OSError as error:
            mend = "make room, or name another folder by FSSPEC_SIMPLECACHE_CACHE_STORAGE"
            raise UserError(f"{folder}: cannot hold a copy of {url} ({one_line(error)}); {mend}") from error
        return copy

    def _read_remote(self, shard: int, offset: int, size: int) -> bytes:
        path, url = self.paths[shard], self.url(shard)

        def read() -> bytes:
            fs, _ = self._filesystem()
            # the plain kind reads ahead by a block of 5 MiB
            data: bytes = fs.cat_file(path, start=offset, end=offset + size, **({} if fs.async_impl else {"block_size": 512}))
            if len(data) > size:
                raise UserError(f"{url}: the server gives whole files only, not parts; download the shards and name the copies")
            if len(data) < size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        return self._patiently(url, read)

    def _facts(self, path: str) -> tuple[int, str]:
        """Size and version of a shard."""
        fs, _ = self._filesystem()
        info = self._patiently(self._url(path), lambda: fs.info(path))
        if info["type"] != "file":
            raise UserError(f"{self._url(path)}: is a folder, not a tar file; name the tar files")
        if info["size"] is None:
            raise UserError(f"{self._url(path)}: the server does not tell its size; download the shards and name the copies")
        if self.is_local:  # `cp -p` and `rsync -t` give a new file the time of an old one
            version = f"{info['mtime']} {info['created']} {info['ino']}"
        else:
            version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
        return int(info["size"]), version

    def _url(self, path: str) -> str:
        return path if self.is_local else str(self._filesystem()[0].unstrip_protocol(path))

    def _patiently(self, url: str, action: Callable[[], T]) -> T:
        """The result of `action`, tried several times on a remote file system; what goes wrong becomes a UserError."""
        for wait in (*(() if self.is_local else WAITS), None):
            try:
                return action()
            except UserError:
                raise
            except FileNotFoundError as error:
                what = "no such file" if self.is_local else "no such file, or it is out of reach"  # http does not tell them apart
                raise UserError(f"{url}: {what}; check the address, or give only the shards that are there") from error
            except Exception as error:  # each protocol raises errors of its own library
                if wait is None or isinstance(error, PermissionError):
                    where = "the disk" if self.is_local else "the address, the network and your credentials"
                    raise UserError(f"{url}: cannot be read ({one_line(error)}); check {where}, then run again") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": _NOTHING, "_copied": {}}


class _RemoteFile(io.RawIOBase):
    """A file of known size by its reader of (offset, size)."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        if size:
            buffer[:size] = self._read_range(self._position, size)
        self._position += size
        return size


def _open_filesystem(address: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    for part in address.split("::"):
        protocol = part.partition("://")[0] if "://" in part else "file"
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            extra = _EXTRAS.get(protocol, protocol)
            raise UserError(f"{address}: {protocol}:// needs a package that is not installed; run pip install fsspec[{extra}]") from error
        except ValueError as error:
            raise UserError(f"{address}: {one_line(error)}; give a path, or a URL such as s3://, gs://, hf:// or https://") from error
    fs, path = fsspec.core.url_to_fs(address)
    return fs, str(path)


def _copies_folder() -> Path:
    import fsspec

    storage = fsspec.config.conf.get("simplecache", {}).get("cache_storage")
    return user_cache("shards") if storage is None else Path(storage).expanduser()
