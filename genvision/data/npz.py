"""Images in an npz, as ADM writes its samples: arr_0 uint8 [N, H, W, 3] and perhaps arr_1 labels."""

import hashlib
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genvision.data.array_files import DAMAGED_ARRAY
from genvision.data.class_names import names_of_labels
from genvision.data.sources import ImageSource, digest_of, one_line
from genvision.errors import UserError
from genvision.progress import track

NPZ_ROWS = 64
DAMAGED_NPZ = (*DAMAGED_ARRAY, zipfile.BadZipFile, zlib.error, KeyError, AttributeError, RuntimeError)


class NpzSource(ImageSource):
    """An npz of finished images; memory-mapped where it is not compressed."""

    def __init__(self, spec: str, path: str) -> None:
        self.spec = spec
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; give npz:FILE with arr_0 uint8 [N, H, W, 3]")
        try:
            with np.load(self.path) as file:
                names: list[str] = file.files
                labels = file["arr_1"] if "arr_1" in names else None
            if "arr_0" in names:
                self.images = open_member(self.path, "arr_0.npy")
        except DAMAGED_NPZ as error:
            raise UserError(f"{self.path}: not an npz file, or damaged ({one_line(error)}); write or copy it again") from error
        if "arr_0" not in names:
            raise UserError(f"{self.path}: has no arr_0 but {', '.join(names)}; expected images uint8 [N, H, W, 3] under arr_0")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8 or not len(self.images):
            raise UserError(f"{self.path}: arr_0 is {self.images.dtype} {list(self.images.shape)}, expected uint8 [N, H, W, 3]")
        if labels is None:
            self.labels, self.label_names = np.zeros(len(self.images), dtype=np.int64), [self.path.stem]
            return
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu":
            raise UserError(f"{self.path}: arr_1 is {labels.dtype} {list(labels.shape)}, expected {len(self.images)} whole numbers")
        self.labels = labels.astype(np.int64)
        self.label_names = names_of_labels(f"{self.path}: arr_1", self.labels, None)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.array(self.images[index]))

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    def fingerprint(self) -> str:
        facts = [list(self.images.shape), self.path.stat().st_size]
        edges = [np.array(self.images[0]), np.array(self.images[-1])]
        return digest_of("npz", np.array(json.dumps(facts)), *edges, self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(f"npz{self.images.shape}".encode())
        starts = range(0, len(self), NPZ_ROWS)
        for start in track(starts, len(starts), "hashing", unit="parts", show=show_progress):
            digest.update(np.ascontiguousarray(self.images[start : start + NPZ_ROWS]).data)
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        return {"npz": len(self)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.images = open_member(self.path, "arr_0.npy")


def open_member(path: Path, member: str) -> np.ndarray:
    """An array of an npz, memory-mapped if it lies there uncompressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                compressed: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
                return compressed
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # a local zip header: its last four bytes are the lengths of name and extra field
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        begin = file.tell()
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or min(shape, default=1) < 1:
            raise ValueError(f"{member} is {dtype} {list(shape)}")
        if file.tell() - begin + math.prod(shape) * dtype.itemsize > info.file_size:  # the next member would be read as its end
            raise ValueError(f"{member} is cut off: it has {info.file_size} bytes, too few for {dtype} {list(shape)}")
        return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")
