"""Where the images of a tar shard lie, found in one pass over its headers and kept in the user's cache folder.

A sample is a run of members that differ only in what follows the first dot of the base name, as WebDataset has it:
`n01440764_10026.jpg` and `n01440764_10026.cls` are one. Its image is the member whose extension is that of an image (`.jpg`; failing
that, one whose last part is, as in `.image.jpg`), its label the number in `.cls`, or else in `.json` under one of JSON_LABELS.
"""

import json
import os
import random
import re
import sys
import tarfile
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genvision.data.array_files import write_whole
from genvision.data.shard_files import THREADS, ShardFiles
from genvision.data.sources import digest_of, one_line
from genvision.errors import UserError
from genvision.progress import track
from genvision.user_cache import user_cache

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "pnm", "tif", "tiff", "gif"})
JSON_LABELS = ("label", "cls", "class", "label_index", "class_index", "class_id")
HEADER = 512
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError)
"""What Python's reader raises on damaged headers; the last two where one claims an absurd size."""
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard in their order."""

    offsets: np.ndarray
    """int64 [n], the byte at which the image begins."""
    sizes: np.ndarray
    """int64 [n], its bytes."""
    labels: np.ndarray | None
    """int64 [n], as they are written in the shard; None if no sample has one."""


def index_shards(files: ShardFiles, show_progress: bool = True) -> list[TarIndex]:
    """The index of every shard, read from the cache folder or made and kept there.

    Several processes may do this at once: each goes through the shards in an order of its own and takes what another has finished.

    Raises:
        UserError: a shard is cut off, damaged, compressed, or holds a sample without exactly one image.
    """
    folder = user_cache("shard_indexes")
    indexes = {shard: index for shard in range(len(files)) if (index := _kept(folder, files, shard)) is not None}
    missing = [shard for shard in range(len(files)) if shard not in indexes]
    random.SystemRandom().shuffle(missing)
    failures: list[str] = []

    def find(shard: int) -> TarIndex:
        index = _kept(folder, files, shard)
        if index is None:
            with files.stream(shard) as file:
                index = index_tar(file, files.url(shard), int(files.sizes[shard]))
            failures.extend(_keep(folder, files, shard, index))
        return index

    with ThreadPoolExecutor(THREADS) as pool:
        found = track(pool.map(find, missing), len(missing), "indexing", unit="shards", show=show_progress and bool(missing))
        indexes |= dict(zip(missing, found, strict=True))
    if failures:
        print(f"warning: {folder}: cannot be written ({failures[0]}); shards are indexed again next time", file=sys.stderr, flush=True)
    return [indexes[shard] for shard in range(len(files))]


def index_tar(file: BinaryIO, url: str, num_bytes: int) -> TarIndex:
    """Read the headers of a whole tar file (ustar, GNU or pax).

    Args:
        url: for messages.
        num_bytes: that the file should have.

    Raises:
        UserError: see `index_shards`.
    """
    samples = _Samples(url, num_bytes)
    try:
        for member in _members(file, url):
            samples.add(member, file)
    except _Damaged as error:
        raise UserError(f"{url}: {error}, after {len(samples.offsets)} whole samples; {_AGAIN}") from error
    except OSError as error:
        raise UserError(f"{url}: cannot be read ({one_line(error)}); check the disk, then run again") from error
    found = file.seek(0, os.SEEK_END)
    if found != num_bytes:
        raise UserError(f"{url}: has {found} bytes now, but had {num_bytes} a moment ago; run again when it is written to its end")
    return samples.finish()


class _Damaged(ValueError):
    """What is wrong with a tar file and where."""


def _members(file: BinaryIO, url: str) -> Iterator[tarfile.TarInfo]:
    """All members, and then a look at what follows them: Python's reader takes whatever it does not understand for the end."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (closing it would close nothing)
    except UserError:  # of a remote file
        raise
    except _TAR_ERRORS as error:
        file.seek(0)
        start = file.read(6)
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        if kind is not None:
            raise UserError(f"{url}: is compressed ({kind}), so images cannot be read at random; unpack it first") from error
        raise UserError(f"{url}: is not a tar file ({one_line(error)}); {_AGAIN}") from error
    last = None
    while True:
        try:
            member = tar.next()
        except UserError:
            raise
        except _TAR_ERRORS as error:
            where = "" if last is None else f" behind member {last.name!r}, whose {last.size} bytes begin at byte {last.offset_data}"
            raise _Damaged(f"is cut off or damaged{where} ({one_line(error)})") from error
        if member is None:
            break
        if member.size < 0:
            raise _Damaged(f"has a damaged header at byte {member.offset}")
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
        last = member
        yield member
    file.seek(tar.offset)
    end = file.read(HEADER)
    if len(end) < HEADER:
        raise _Damaged(f"ends at byte {tar.offset + len(end)} without an end mark")
    if any(end):
        raise _Damaged(f"has a damaged header at byte {tar.offset}")
    while rest := file.read(1 << 20):
        if any(rest):
            raise UserError(f"{url}: goes on behind its end mark at byte {tar.offset}; join tar files with tar --concatenate, not with cat")


class _Samples:
    """Gathers samples from members that come one by one."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self.url, self.num_bytes = url, num_bytes
        self.offsets, self.sizes, self.labels = array("q"), array("q"), array("q")
        self.first_key: str | None = None
        self._begin(None)

    def _begin(self, key: str | None) -> None:
        self.key = key
        self.extensions: list[str] = []
        self.images: list[tuple[str, int, int]] = []
        self.cls: bytes | None = None
        self.json: bytes | None = None

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        # no part of a sample: README, the `._name.jpg` of macOS, WebDataset's `__about__.json`
        if member.isdir() or not stem or not extension or (stem.startswith("__") and stem.endswith("__")):
            return
        if not member.isreg() or member.issparse():
            raise UserError(f"{self.url}: {member.name!r} is a link or a special file; pack plain files (tar -h --hard-dereference)")
        key = f"{folder}/{stem}" if folder else stem
        if key != self.key:
            self._end()
            self._begin(key)
        if member.offset_data + member.size > self.num_bytes:
            raise _Damaged(f"is cut off in member {member.name!r}, whose {member.size} bytes begin at byte {member.offset_data}")
        extension = extension.lower()
        self.extensions.append(f".{extension}")
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            self.images.append((extension, member.offset_data, member.size))
        elif extension == "cls":
            self.cls = _content(member, file)
        elif extension == "json":
            self.json = _content(member, file)

    def finish(self) -> TarIndex:
        self._end()
        offsets, sizes, labels = (np.array(part, dtype=np.int64) for part in (self.offsets, self.sizes, self.labels))
        return TarIndex(offsets, sizes, labels if len(labels) else None)

    def _end(self) -> None:
        """The sample is complete: check and keep it."""
        if self.key is None:
            return
        images = [image for image in self.images if "." not in image[0]] or self.images
        if not images:
            others = ", ".join(self.extensions)
            raise self._wrong(f"has no image, only {others!r}; pack the members of a sample next to one another (tar --sort=name)")
        if len(images) > 1:
            first, second = images[0][0], images[1][0]
            raise self._wrong(f"has two images ({first!r}, {second!r}); keep one, or call the others KEY.NAME.png")
        label = self._label()
        if self.first_key is None:
            self.first_key = self.key
        elif (label is not None) != bool(self.labels):
            has, other = ("no label", "has one") if label is None else ("a label", "has none")
            mend = "label all samples or none, each .cls next to its image (tar --sort=name)"
            raise self._wrong(f"has {has}, but {self.first_key!r} {other}; {mend}")
        self.offsets.append(images[0][1])
        self.sizes.append(images[0][2])
        if label is not None:
            self.labels.append(label)

    def _label(self) -> int | None:
        if self.cls is not None:
            return self._number(self.cls.decode("utf-8", "replace"), ".cls")
        if self.json is None:
            return None
        try:
            content = json.loads(self.json)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"has a .json that cannot be read ({one_line(error)}); mend or remove it") from error
        key = next((key for key in JSON_LABELS if isinstance(content, dict) and content.get(key) is not None), None)
        return None if key is None else self._number(content[key], f".json under {key!r}")

    def _number(self, value: Any, where: str) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch("-?[0-9]{1,9}", text):
            raise self._wrong(f"has {text[:40]!r} as its label ({where}), expected the number of a class; write the number")
        return int(text)

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.url}: sample {self.key!r} {what}")


def _content(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _kept(folder: Path, files: ShardFiles, shard: int) -> TarIndex | None:
    """The index of a shard as it is now, if the cache folder has it."""
    path = _path(folder, files, shard)
    try:
        with safe_open(path, framework="np") as file:
            checksum = (file.metadata() or {})["checksum"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        checksum, reason = None, one_line(error)
    else:
        reason = "its checksum does not fit"
    if checksum is None or checksum != _checksum(arrays):
        print(f"warning: {path}: is damaged ({reason}); {files.url(shard)} is indexed again", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        return None
    return TarIndex(arrays["offsets"], arrays["sizes"], arrays.get("labels"))


def _keep(folder: Path, files: ShardFiles, shard: int, index: TarIndex) -> list[str]:
    """Why it could not be kept: nothing or one reason."""
    arrays = {"offsets": index.offsets, "sizes": index.sizes} | ({} if index.labels is None else {"labels": index.labels})
    content = save(arrays, metadata={"checksum": _checksum(arrays), "shard": files.url(shard)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(_path(folder, files, shard), lambda file: file.write(content))
    except OSError as error:
        return [one_line(error)]
    return []


def _path(folder: Path, files: ShardFiles, shard: int) -> Path:
    facts = [files.url(shard), str(files.sizes[shard]), files.versions[shard]]
    return folder / f"tar-{digest_of('tar index 1', np.array(facts))[:32]}.safetensors"


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return digest_of("tar index", *(arrays[name] for name in sorted(arrays)))
