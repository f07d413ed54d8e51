"""WebDataset's tar shards, `wds:SHARDS`, read at random by an index instead of as a stream, so that order and resume are exact.

SHARDS is a path or any fsspec URL: one file, a folder, a pattern (`data/train-*.tar`), or braces (`s3://bucket/train-{000..146}.tar`).
Each remote image is one request; `simplecache::s3://...` copies shards to the disk when they are first used (see shard_files.py). What
makes a sample, and where its label comes from, is told in tar_index.py. Without labels all images are of one class, `all`. Names of the
classes come from a file in the folder of the first shard, else they are numbers: `classes.txt` (one name a line), `label_names.json`
(a list, or an object that holds it under `label_names`), or `dataset_info.json` of Hugging Face (its one ClassLabel feature).
"""

import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from genvision.data.class_names import list_of_names, names_of_labels
from genvision.data.order import Order, SampleOrder
from genvision.data.shard_files import THREADS, ShardFiles
from genvision.data.sources import BadImageError, ImageSource, count_formats, decode_rgb, digest_of, one_line, spread
from genvision.data.tar_index import HEADER, TarIndex, index_shards
from genvision.errors import UserError
from genvision.progress import Progress

REMOTE_WINDOW = 1 << 16
REMOTE_BLOCK = 256
"""Remote sets are shuffled in smaller windows, so that few shards are in use at a time."""
HASH_CHUNK = 256
NAME_FILES = ("classes.txt", "label_names.json", "dataset_info.json")


class TarShardSource(ImageSource):
    """Samples of tar shards: in the order of the shards, and in each as they lie there."""

    def __init__(self, spec: str, shards: str) -> None:
        self.spec = spec
        self.files = ShardFiles(shards)
        indexes = index_shards(self.files, show_progress=os.environ.get("RANK", "0") == "0")
        self._ends = np.cumsum([len(index.offsets) for index in indexes], dtype=np.int64)
        if not self._ends[-1]:
            raise UserError(f"{spec}: the shards hold no samples; give shards with members such as 000001.jpg and 000001.cls")
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = _narrow(np.concatenate([index.sizes for index in indexes]))
        labels = self._labels(indexes)
        if labels is None:
            self.labels, self.label_names = np.zeros(len(self._offsets), dtype=np.int64), ["all"]
        else:
            self.labels, self.label_names = labels, names_of_labels(spec, labels, _class_names(self.files))

    def load(self, index: int) -> Image.Image:
        try:
            return decode_rgb(io.BytesIO(self._bytes(index)), self.spec)
        except BadImageError as error:
            self.files.check_unchanged(self._shard(index))  # other images may lie where the index says
            raise BadImageError(self.name(index), error.reason) from error

    def name(self, index: int) -> str:
        """Shard and member. Keys of samples are not kept: the header is read again, which cuts names at 100 characters."""
        shard, offset = self._shard(index), int(self._offsets[index])
        try:
            header = self.files.read(shard, offset - HEADER, HEADER)
            member = repr(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[1:-1]
        except (UserError, tarfile.TarError):  # the shard has changed or is out of reach
            member = f"image at byte {offset}"
        return f"{self.files.url(shard)}: {member}"

    def fingerprint(self) -> str:
        names = [path.rpartition("/")[2] for path in self.files.paths]
        facts = json.dumps([names, self.files.sizes.tolist(), self._ends.tolist()])
        return digest_of("wds", np.array(facts), self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(b"wds")
        progress = Progress(len(self), "hashing", show=show_progress)
        with ThreadPoolExecutor(THREADS) as pool:
            for hashes in pool.map(self._hashes, range(0, len(self), HASH_CHUNK)):
                digest.update(b"".join(hashes))
                progress.advance(len(hashes))
        progress.close()
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        with ThreadPoolExecutor(THREADS) as pool:
            return count_formats(pool.map(self._first_bytes, spread(len(self)).tolist()))

    def encoded_bytes(self) -> int:
        return int(self._sizes.sum(dtype=np.int64))

    def order(self, window: int | None = None) -> Order:
        if self.files.is_local:
            return super().order(window)
        return SampleOrder(len(self), window or REMOTE_WINDOW, REMOTE_BLOCK)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _bytes(self, index: int) -> bytes:
        return self.files.read(self._shard(index), int(self._offsets[index]), int(self._sizes[index]))

    def _first_bytes(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.files.read(self._shard(index), int(self._offsets[index]), min(int(self._sizes[index]), 12)))

    def _hashes(self, start: int) -> list[bytes]:
        return [hashlib.sha256(self._bytes(index)).digest() for index in range(start, min(start + HASH_CHUNK, len(self)))]

    def _labels(self, indexes: list[TarIndex]) -> np.ndarray | None:
        """int64 [N]; None if no shard has labels."""
        filled = [shard for shard, index in enumerate(indexes) if len(index.offsets)]
        without = [shard for shard in filled if indexes[shard].labels is None]
        if len(without) == len(filled):
            return None
        if without:
            other = next(shard for shard in filled if indexes[shard].labels is not None)
            bare, labelled = self.files.url(without[0]), self.files.url(other)
            raise UserError(f"{bare}: its samples have no label, but those of {labelled} have; label all shards or none")
        return np.concatenate([labels for index in indexes if (labels := index.labels) is not None])


def _narrow(sizes: np.ndarray) -> np.ndarray:
    return sizes.astype(np.int32) if sizes.max() < 1 << 31 else sizes


def _class_names(files: ShardFiles) -> list[str] | None:
    """Names from a file beside the shards, if there is one."""
    for name in NAME_FILES:
        content = files.read_beside(name)
        if content is None:
            continue
        try:
            found = _names_in(name, content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{name} beside {files.url(0)}: cannot be read ({one_line(error)}); mend or remove it") from error
        if found:
            return found
    return None


def _names_in(name: str, content: bytes) -> list[str]:
    if name == "classes.txt":
        lines = content.decode("utf-8-sig").strip().splitlines()  # editors on Windows put a mark before the first line
        return [line.strip() for line in lines]
    parsed = json.loads(content)
    if name == "label_names.json":
        return list_of_names(parsed if isinstance(parsed, list) else parsed["label_names"])
    features = (parsed.get("features") or {}).values()
    class_labels = [feature for feature in features if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"]
    return list_of_names(class_labels[0]["names"]) if len(class_labels) == 1 else []
