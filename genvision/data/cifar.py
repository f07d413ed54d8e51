"""CIFAR-10 and CIFAR-100 as Krizhevsky hands them out: the pickles of the Python version, or the records of the binary version.

`cifar:DIR` or `cifar:DIR:train` are the 50,000 images of the training set, `cifar:DIR:test` the 10,000 of the test set. DIR holds the
files, or the folder that the archive makes. Labels of CIFAR-100 are the fine ones. A record of the binary version is one label (CIFAR-100:
the coarse one, then the fine one) and 3 x 32 x 32 bytes: all red values, then green, then blue.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genvision.data.image_arrays import ArrayFile, ArraySource, planes
from genvision.data.pickled_batches import check_range, open_batch, read_dictionary
from genvision.data.sources import path_and_part
from genvision.errors import UserError

SIZE = 32


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What one archive holds."""

    folder: str
    files: dict[str, tuple[str, ...]]
    """Part to files."""
    names_file: str
    names_key: str = ""
    label_key: str = ""
    """Keys of the pickles."""
    label_bytes: int = 0
    """Of a binary record; 0: the files are pickles."""

    def stands_in(self, folder: Path) -> bool:
        names = (self.names_file, *self.files["train"], *self.files["test"])
        return any((folder / name).is_file() for name in names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    _Layout(
        folder="cifar-10-batches-py",
        files={"train": _BATCHES, "test": ("test_batch",)},
        names_file="batches.meta",
        names_key="label_names",
        label_key="labels",
    ),
    _Layout(
        folder="cifar-100-python",
        files={"train": ("train",), "test": ("test",)},
        names_file="meta",
        names_key="fine_label_names",
        label_key="fine_labels",
    ),
    _Layout(
        folder="cifar-10-batches-bin",
        files={"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        names_file="batches.meta.txt",
        label_bytes=1,
    ),
    _Layout(
        folder="cifar-100-binary",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        names_file="fine_label_names.txt",
        label_bytes=2,
    ),
)


class CifarSource(ArraySource):
    """The training or test images of CIFAR-10 or CIFAR-100, in the order of the files."""

    def __init__(self, spec: str, rest: str) -> None:
        folder, part = path_and_part(spec, rest, ("train", "test"))
        folder, layout = _find(spec, folder)
        label_names = _label_names(folder / layout.names_file, layout)
        paths = [folder / name for name in layout.files[part]]
        opened = [_open_records(path, layout) if layout.label_bytes else open_batch(path, SIZE, layout.label_key) for path in paths]
        for path, (_, labels) in zip(paths, opened, strict=True):
            check_range(f"{path}:", labels, 0, len(label_names) - 1)
        super().__init__(spec, [file for file, _ in opened], np.concatenate([labels for _, labels in opened]), label_names)


def _find(spec: str, folder: Path) -> tuple[Path, _Layout]:
    found = [(place, layout) for layout in LAYOUTS for place in (folder, folder / layout.folder) if layout.stands_in(place)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(place / layout.names_file) for place, layout in found)
        raise UserError(f"{spec}: holds CIFAR in several forms ({names}); give the folder of one, each archive in a folder of its own")
    archives = sorted(folder.glob("cifar-*.tar.gz")) if folder.is_dir() else [folder]
    if archives and archives[0].name.endswith((".tar.gz", ".tgz", ".tar")):
        raise UserError(f"{archives[0]}: is an archive; extract it first, then give cifar:DIR of the folder that it makes")
    raise UserError(f"{folder}: holds no CIFAR; expected a folder with data_batch_1 (CIFAR-10), train (CIFAR-100) or their .bin files")


def _label_names(path: Path, layout: _Layout) -> list[str]:
    if layout.label_bytes:
        if not path.is_file():
            raise UserError(f"{path}: is missing; extract all of the archive")
        return path.read_text(encoding="latin1").split()
    names: Any = read_dictionary(path).get(layout.names_key)
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: has no list {layout.names_key}; download the data set again")
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _open_records(path: Path, layout: _Layout) -> tuple[ArrayFile, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; extract all of the archive")
    width = layout.label_bytes + 3 * SIZE * SIZE
    size = path.stat().st_size
    if not size or size % width:
        raise UserError(f"{path}: has {size} bytes, expected a multiple of {width}; download the data set again")
    open_records = partial(np.memmap, path, np.uint8, "r", shape=(size // width, width))
    records = open_records()
    labels = np.array(records[:, layout.label_bytes - 1], dtype=np.int64)
    return ArrayFile(path, records, open_records, partial(_behind_labels, layout.label_bytes)), labels


def _behind_labels(label_bytes: int, record: np.ndarray) -> np.ndarray:
    return planes(SIZE, record[label_bytes:])
