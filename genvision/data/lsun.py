"""LSUN's lmdb folders, one a category and split (arXiv:1506.03365): `bedroom_train_lmdb`, `church_outdoor_val_lmdb`.

A key is 40 hexadecimal digits, a value an encoded image (JPEG or WebP, told by its bytes). There is no label inside: the category is the
name of the folder. `lsun:DIR,DIR` joins several folders; those of one category have one label. Where all categories are among the ten
scenes, labels follow the benchmark's order (bedroom first, tower last) whatever order the folders are given in, so all ten have its own
indices; otherwise the order given.
"""

import hashlib
import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genvision.data.array_files import DAMAGED_ARRAY, alone, write_whole
from genvision.data.sources import BadImageError, ImageSource, count_formats, decode_rgb, digest_of, one_line, spread
from genvision.errors import UserError
from genvision.progress import track
from genvision.user_cache import user_cache

SCENES = (
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)


class LsunSource(ImageSource):
    """Images of lmdb folders in the order of the folders given, sorted by key in each."""

    def __init__(self, spec: str, folders: str) -> None:
        self.spec = spec
        self.folders = [Path(folder).expanduser() for folder in folders.split(",") if folder]
        if not self.folders:
            raise UserError(f"{spec}: names no folder; expected lsun:DIR or lsun:DIR,DIR")
        self._tables = [_Table(folder) for folder in self.folders]
        counts = [len(table.keys) for table in self._tables]
        self._ends = np.cumsum(counts)
        categories = [_category(folder) for folder in self.folders]
        self.label_names = list(dict.fromkeys(categories))
        if set(self.label_names) <= set(SCENES):
            self.label_names.sort(key=SCENES.index)
        self.labels = np.repeat(np.array([self.label_names.index(name) for name in categories], dtype=np.int64), counts)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self._value(index)), self.name(index))

    def name(self, index: int) -> str:
        table, place = self._find(index)
        return f"{table.folder}: key {os.fsdecode(table.keys[place])}"

    def fingerprint(self) -> str:
        return digest_of("lsun", *(part for table in self._tables for part in (table.keys, table.facts)), self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(b"lsun")
        for index in track(range(len(self)), len(self), "hashing", show=show_progress):
            digest.update(hashlib.sha256(self._value(index)).digest())
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        return count_formats(io.BytesIO(self._value(int(index))) for index in spread(len(self)))

    def _value(self, index: int) -> bytes:
        table, place = self._find(index)
        try:
            return table.value(place)
        except ValueError as error:
            raise BadImageError(self.name(index), str(error)) from error

    def _find(self, index: int) -> "tuple[_Table, int]":
        which = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[which]
        return table, index - int(self._ends[which]) + len(table.keys)


class _Table:
    """One lmdb folder, opened anew in every process: a handle of lmdb must not cross a fork.

    Its keys are listed once and kept in the user's cache folder, so that later runs need not walk a database of many gigabytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "data.mdb").is_file():
            below = sorted(path.parent.name for path in folder.glob("*/data.mdb"))
            mend = f"give one of its folders, for example lsun:{folder / below[0]}" if below else "give an unpacked folder of LSUN"
            raise UserError(f"{folder}: there is no data.mdb in it; {mend}")
        with _environment(folder).begin() as transaction:
            entries = int(transaction.stat()["entries"])
        if not entries:
            raise UserError(f"{folder}: holds no images; download and unpack it again")
        stat = (folder / "data.mdb").stat()
        self.facts = np.array([entries, stat.st_size])
        """The number of entries and the size of the file."""
        stamp = [entries, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        identity = digest_of("lsun keys", np.array([str(folder.resolve())]), np.array(stamp))
        self.keys = self._known_keys(user_cache("shard_indexes") / f"lsun-{identity[:32]}.npy", entries)
        """Bytes of fixed width [N], ascending."""

    def value(self, place: int) -> bytes:
        """One value as it is stored.

        Raises:
            ValueError: the database is damaged there.
        """
        import lmdb

        try:
            with _environment(self.folder).begin() as transaction:
                value: bytes | None = transaction.get(bytes(self.keys[place]))
        except lmdb.Error as error:
            raise ValueError(one_line(error)) from error
        if value is None:
            raise ValueError("the database holds no such key any more")
        return value

    def _known_keys(self, path: Path, entries: int) -> np.ndarray:
        keys = _stored_keys(path, entries)
        if keys is not None:
            return keys
        with alone(path):
            keys = _stored_keys(path, entries)  # another process may have listed them meanwhile
            if keys is not None:
                return keys
            keys = self._list_keys(entries)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: np.save(file, keys))
            except OSError as error:
                print(
                    f"warning: {path}: cannot be written ({error.strerror or one_line(error)}); they are listed again next time",
                    file=sys.stderr,
                    flush=True,
                )
        return keys

    def _list_keys(self, entries: int) -> np.ndarray:
        import lmdb

        try:
            with _environment(self.folder).begin() as transaction:
                found = transaction.cursor().iternext(keys=True, values=False)
                show = os.environ.get("RANK", "0") == "0"
                keys = list(track(found, entries, f"listing {self.folder.name}", unit="keys", show=show))
        except lmdb.Error as error:
            raise UserError(f"{self.folder}: is damaged ({one_line(error)}); download and unpack it again") from error
        if any(key.endswith(b"\0") for key in keys):  # numpy would drop the last byte
            raise UserError(f"{self.folder}: has keys that end in a zero byte, LSUN's are hexadecimal text; write it with such keys")
        return np.array(keys, dtype=np.bytes_)


def _stored_keys(path: Path, entries: int) -> np.ndarray | None:
    """Keys that were listed before, if they are there and whole."""
    try:
        keys: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except DAMAGED_ARRAY as error:
        print(f"warning: {path}: is damaged ({one_line(error)}); the keys are listed again", file=sys.stderr, flush=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    return keys if keys.shape == (entries,) and keys.dtype.kind == "S" else None


_environments: dict[Path, tuple[int, Any]] = {}
"""Folder to (process, environment): lmdb refuses to open one twice in a process, and two sources may read the same folder."""


def _environment(folder: Path) -> Any:
    path = folder.resolve()
    process, environment = _environments.get(path, (0, None))
    if process == os.getpid():
        return environment
    if environment is not None:
        environment.close()  # this process's copy of what its parent had open: the parent's stays open
    environment = _open(folder)
    _environments[path] = (os.getpid(), environment)
    return environment


def _open(folder: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"lsun:{folder}: needs the package lmdb; run pip install genvision[lsun]") from error
    try:
        # no lock: the folder may be read-only, and nobody writes; no readahead: reads are at random
        environment = lmdb.open(str(folder), readonly=True, create=False, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise UserError(f"{folder}: cannot be opened as an lmdb database ({one_line(error)}); download and unpack it again") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = (folder / "data.mdb").stat().st_size
    if found < needed:  # reading beyond the end would kill the process without a word
        environment.close()
        raise UserError(f"{folder}: is cut off, data.mdb has {found} of {needed} bytes; download and unpack it again")
    return environment


def _category(folder: Path) -> str:
    return re.sub(r"(_(train|val))?_lmdb$", "", folder.absolute().name)
