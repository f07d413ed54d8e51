"""IDX files: MNIST, Fashion-MNIST, KMNIST and EMNIST, gzipped or not.

`idx:FILE` is a file of images, its labels stand beside it under the usual name: train-images-idx3-ubyte and train-labels-idx1-ubyte
(t10k-..., emnist-letters-train-...; a dot may stand before idx3). `idx:DIR` and `idx:DIR:test` find the file of images in a folder.

A file begins with a magic number (0x00000803 images, 0x00000801 labels) and its sizes, each as four bytes, highest first. EMNIST holds
every image with rows and columns exchanged, which is undone here; its letters are numbered from 1, which become 0 to 25. Its mapping.txt,
if it is there, gives the classes their characters. A gzipped file is unpacked into memory, another one is memory-mapped.
"""

import gzip
import math
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from genvision.data.class_names import names_of_labels
from genvision.data.image_arrays import ArrayFile, ArraySource
from genvision.data.sources import one_line, path_and_part
from genvision.errors import UserError

MAGIC = {"images": 0x00000803, "labels": 0x00000801}
"""Third byte: unsigned bytes; fourth byte: number of sizes."""
PART_NAMES = {"train": ("train",), "test": ("t10k", "test")}


class IdxSource(ArraySource):
    """Grey images of one IDX file, with the labels beside it."""

    def __init__(self, spec: str, rest: str) -> None:
        path, part = path_and_part(spec, rest, ("train", "test"))
        path = _file_of(path, part) if path.is_dir() else path
        images = _read(path, "images")
        labels_path = _labels_beside(path)
        labels = np.array(_read(labels_path, "labels"), dtype=np.int64)
        if len(labels) != len(images):
            raise UserError(f"{labels_path}: has {len(labels)} labels, {path.name} {len(images)} images; they do not belong together")
        names = _mapping(path)
        if path.name.startswith("emnist-letters"):
            if labels.min() < 1:
                raise UserError(f"{labels_path}: has the label {labels.min()}, letters of EMNIST are numbered from 1; download it again")
            labels = labels - 1
        arrange = np.transpose if path.name.startswith("emnist-") else np.asarray
        file = ArrayFile(path, images, partial(_read, path, "images"), arrange)
        super().__init__(spec, [file], labels, names_of_labels(str(labels_path), labels, names))


def _file_of(folder: Path, part: str) -> Path:
    found = [entry for entry in sorted(folder.iterdir()) if re.search(r"images[-.]idx3-ubyte(\.gz)?$", entry.name) and entry.is_file()]
    if not found:
        raise UserError(
            f"{folder}: no IDX file of images in it; expected train-images-idx3-ubyte or t10k-images-idx3-ubyte, perhaps with .gz"
        )
    chosen = [path for path in found if set(PART_NAMES[part]) & set(re.split(r"[-.]", path.name))]
    chosen = [path for path in chosen if path.suffix != ".gz" or path.with_suffix("") not in chosen]  # both: the extracted one
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(path.name for path in chosen or found)
    raise UserError(f"{folder}: {'several files' if chosen else 'no file'} of {part} images among {listed}; give idx:FILE")


def _labels_beside(path: Path) -> Path:
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    other = plain.replace("-idx1", ".idx1") if "-idx1" in plain else plain.replace(".idx1", "-idx1")
    for name in (plain, f"{plain}.gz", other, f"{other}.gz"):
        if "labels" in name and (path.parent / name).is_file():
            return path.parent / name
    raise UserError(f"{path}: no labels beside it; expected the usual names, such as train-images-idx3-ubyte and train-labels-idx1-ubyte")


def _read(path: Path, kind: str) -> np.ndarray:
    """uint8 of the shape that the header states, after a check that the file is that long; memory-mapped if it is not gzipped."""
    start = 4 + 4 * (MAGIC[kind] & 0xFF)  # the last byte of the magic number counts the sizes
    is_packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            head = file.read(start)
            magic, *shape = np.frombuffer(head[: len(head) // 4 * 4], dtype=">u4").tolist() or [0]
            if magic != MAGIC[kind]:
                raise UserError(f"{path}: is no IDX file of {kind}, which begins with {MAGIC[kind]:08x}; download it again")
            expected = start + math.prod(shape)
            # a little file may unpack to any size: one byte beyond the end is enough to know that it is too long
            content = file.read(expected - start + 1) if is_packed else b""
        found = len(head) + len(content) if is_packed else path.stat().st_size
        if found != expected or 0 in shape:
            has = f"more than {expected}" if is_packed and found > expected else found
            raise UserError(f"{path}: has {has} bytes, expected {expected} for {shape} {kind}; download it again")
        if is_packed:
            return np.frombuffer(content, dtype=np.uint8).reshape(shape)
        return np.memmap(path, np.uint8, "r", offset=start, shape=tuple(shape))
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); download it again") from error


def _mapping(path: Path) -> list[str] | None:
    """Characters of EMNIST's classes; None if the file is not there."""
    file = path.with_name(re.sub(r"-(train|test)-.*", "-mapping.txt", path.name))
    if file.name == path.name or not file.is_file():
        return None
    try:
        rows = [[int(number) for number in line.split()] for line in file.read_text().splitlines() if line.strip()]
        return [chr(codes[0]) for _, *codes in sorted(rows)]
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{file}: cannot be read ({one_line(error)}); expected lines such as '10 65', a class and the code of its character"
        ) from error
