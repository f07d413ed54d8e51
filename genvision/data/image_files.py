"""Images in files: class folders, a flat folder with or without labels.json, and scikit-learn's digits."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genvision.data.class_names import list_of_names, names_of_labels
from genvision.data.sources import ImageSource, count_formats, decode_rgb, digest_of, file_hash, one_line, spread
from genvision.errors import UserError
from genvision.progress import track

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HASH_THREADS = 8
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class FolderSource(ImageSource):
    """Image files: class folders in sorted order, or a flat folder. Names that begin with a dot are no part of it."""

    def __init__(self, spec: str, path: str) -> None:
        self.spec = spec
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; give folder:PATH of a folder that holds one sub-folder of images a class")
        if (self.root / "labels.json").is_file():
            names = self._read_labels_file(self.root / "labels.json")
        else:
            names = self._walk()
        self._names = np.array([os.fsencode(name) for name in names])  # one block: a list would be copied by every forked worker

    def load(self, index: int) -> Image.Image:
        name = self.name(index)
        return decode_rgb(name, name)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._names[index]))

    def fingerprint(self) -> str:
        return digest_of("folder", self._names, np.array(self._sizes()), self.labels)

    def encoded_bytes(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        """Bytes of every file."""
        sizes = []
        for index in range(len(self)):
            try:
                sizes.append(Path(self.name(index)).stat().st_size)
            except FileNotFoundError as error:
                raise UserError(f"{self.name(index)}: the image is gone; run again to read the folder anew") from error
        return sizes

    def content_hash(self, show_progress: bool = False) -> str:
        names = [self.name(index) for index in range(len(self))]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = [*track(pool.map(file_hash, names), len(names), "hashing", show=show_progress)]
        return digest_of("folder", self._names, np.array(digests), self.labels)

    def stored_formats(self) -> dict[str, int]:
        names = (self.name(int(index)) for index in spread(len(self)))
        return count_formats(Path(name).open("rb") for name in names)

    def _walk(self) -> list[str]:
        entries = sorted(visible(self.root), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        flat = [entry.name for entry in entries if is_image(entry)]
        if folders and flat:
            raise UserError(
                f"{self.root}: holds images ({flat[0]}) beside sub-folders ({folders[0]}); put every image into the folder of its class"
            )
        if flat:
            self.label_names = [self.root.resolve().name]
            self.labels = np.zeros(len(flat), dtype=np.int64)
            return flat
        if folders and set(folders) <= SPLIT_NAMES:
            raise UserError(
                f"{self.root}: its sub-folders are splits, not classes ({', '.join(folders)}); give folder:{self.root / folders[0]}"
            )
        per_class = [images_below(self.root / folder, folder) for folder in folders]
        if not any(per_class):
            raise UserError(f"{self.root}: no images in it; expected CLASS/IMAGE with one of {', '.join(IMAGE_SUFFIXES)}")
        empty = [folder for folder, names in zip(folders, per_class, strict=True) if not names]
        if empty:
            raise UserError(f"{self.root / empty[0]}: is the folder of a class but holds no images; fill or remove it")
        self.label_names = folders
        self.labels = np.repeat(np.arange(len(folders), dtype=np.int64), [len(names) for names in per_class])
        return [name for names in per_class for name in names]

    def _read_labels_file(self, file: Path) -> list[str]:
        """labels.json: {"labels": {"000000.png": 3, ...}, "label_names": [...]}; only the images it lists belong to the source."""
        try:
            content = json.loads(file.read_bytes())
            labels: dict[str, int] = dict(content["labels"])
            self.labels = np.array([_whole_number(label) for label in labels.values()], dtype=np.int64)
            label_names = content.get("label_names")
            label_names = None if label_names is None else list_of_names(label_names)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(
                f'{file}: cannot be read ({one_line(error)}); expected {{"labels": {{"000000.png": 3}}, "label_names": [...]}}'
            ) from error
        if not labels:
            raise UserError(f"{file}: lists no images")
        present = {entry.name for entry in visible(self.root)}
        for name in labels:
            if name not in present and not (self.root / name).is_file():
                raise UserError(f"{self.root / name}: is missing, but {file.name} lists it; restore it or take it off the list")
        self.label_names = names_of_labels(str(file), self.labels, label_names)
        return list(labels)


class DigitsSource(ImageSource):
    """scikit-learn's digits; the two halves were written by different people (except at the seam)."""

    def __init__(self, spec: str, part: str) -> None:
        parts = {"": slice(None), "first": slice(0, 898), "second": slice(898, None)}
        if part not in parts:
            raise UserError(f"{spec}: part '{part}' is unknown; choose digits, digits:first or digits:second")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(f"{spec}: needs scikit-learn, which holds the data; run pip install genvision[digits]") from error
        data = load_digits()
        self.spec = spec
        self.images = np.round(data.images[parts[part]] * 255 / 16).astype(np.uint8)
        self.labels = data.target[parts[part]].astype(np.int64)
        self.label_names = [str(digit) for digit in range(10)]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def fingerprint(self) -> str:
        return digest_of("digits", self.images, self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        return self.fingerprint()

    def stored_formats(self) -> dict[str, int]:
        return {"array": len(self)}


def visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()


def images_below(folder: Path, prefix: str) -> list[str]:
    """Names of all images in a folder and below, relative to the root, sorted."""
    names = []
    for entry in visible(folder):
        if entry.is_dir():
            names += images_below(folder / entry.name, f"{prefix}/{entry.name}")
        elif is_image(entry):
            names.append(f"{prefix}/{entry.name}")
    return sorted(names)


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"label {value!r} is not a whole number")
    return value
