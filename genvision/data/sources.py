"""Where images come from: a SPEC string names a source of labelled images with random access.

`digits`, `digits:first`, `digits:second`   scikit-learn's 1,797 handwritten digits, 8 x 8
`folder:PATH`                               one sub-folder a class; or a flat folder, labelled by its labels.json if it has one
`parquet:GLOB`                              parquet files in the Hugging Face layout (image, label)
`npz:FILE`                                  ADM's sample files: arr_0 uint8 [N, H, W, 3] and perhaps arr_1 labels

A path alone means folder, parquet or npz by what it is. Images come back as plain RGB, as torchvision's ImageFolder gives them:

1-bit and 8-bit grey      three equal channels
16-bit grey or colour     the high byte of each value
palette, CMYK, YCbCr, LAB converted by Pillow
transparency              dropped: the colour below it counts
32-bit whole numbers beyond 16 bits, and floating-point pixels: refused by name, since nobody says where white is
EXIF rotation             not applied
"""

import difflib
import errno
import glob
import hashlib
import io
import json
import os
import struct
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from genvision.errors import UserError
from genvision.progress import track

OnBadImage = Literal["stop", "skip"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FILE_ERRNOS = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}  # None: raised by Pillow itself
FORMAT_SAMPLE = 1000
"""Images whose storage format is looked at."""
MAGIC = {"PNG": b"\x89PNG", "JPEG": b"\xff\xd8\xff", "BMP": b"BM", "WebP": b"RIFF"}
HASH_THREADS = 8
NPZ_ROWS = 64
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class BadImageError(UserError):
    """An image that cannot be decoded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, " ".join(reason.split())

    def __str__(self) -> str:
        mend = "replace or remove it, or leave such images out with on_bad_image skip"
        return f"{self.name}: cannot be read as an image ({self.reason}); {mend}"


class ImageSource(ABC):
    """Labelled images with random access; picklable, and safe to use in forked workers."""

    spec: str
    """The string it was opened with."""
    labels: np.ndarray
    """int64 [N], indices into `label_names`."""
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """One image as RGB.

        Raises:
            BadImageError: it cannot be decoded.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call one image in a message."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 that changes with the number, order, labels and sizes of the images; cheap, reads no image."""

    @abstractmethod
    def content_hash(self, show_progress: bool = False) -> str:
        """sha256 over the bytes of all images as they are stored, their order and their labels; reads all of them."""

    @abstractmethod
    def stored_formats(self) -> dict[str, int]:
        """How the images are stored, by their first bytes: format to count, over at most FORMAT_SAMPLE images."""

    def encoded_bytes(self) -> int | None:
        """What all images take as they are stored (JPEG, PNG, ...), in bytes; None where they are no image files. Reads no image."""
        return None


def open_source(spec: str) -> ImageSource:
    """Open the images that `spec` names (the forms are at the head of this file).

    Raises:
        UserError: the form is unknown, or there are no images.
    """
    scheme, _, rest = spec.partition(":")
    if scheme not in SCHEMES and Path(spec).expanduser().exists():
        return _open_path(spec)
    if scheme == "encoded":
        raise UserError(f"{spec}: holds codes, not images; give the images that it was made from (folder:, parquet:, npz:, digits)")
    if scheme in ("hub", "wds"):
        raise UserError(f"{spec}: {scheme}: is not available yet; download the data and give folder:PATH or parquet:GLOB")
    if scheme not in SCHEMES:
        raise UserError(_unknown(spec, scheme))
    if scheme != "digits" and not rest:
        raise UserError(f"{spec}: nothing stands behind {scheme}:, expected {scheme}:{_ARGUMENTS[scheme]}")
    return SCHEMES[scheme](spec, rest)


def open_image(path: str | Path) -> Image.Image:
    """One image file as RGB.

    Raises:
        UserError: there is no such file.
        BadImageError: it cannot be decoded.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of an image")
    return decode_rgb(str(path), str(path))


def decode_rgb(file: Any, name: str) -> Image.Image:
    """Decode a whole image, a path or an open file, to RGB; `name` is for the message.

    Raises:
        BadImageError: it is damaged, cut off, or no image.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImageError(name, "unknown or damaged format") from error
    except OSError as error:
        if error.errno not in _FILE_ERRNOS:  # a failing disk or network is no bad image, and never skipped
            raise UserError(f"{name}: cannot be read ({error}); check the disk or network, then run again") from error
        raise BadImageError(name, error.strerror or str(error)) from error
    # Pillow's decoders raise all of these on damaged files; MemoryError is a header that claims an absurd size
    except (SyntaxError, ValueError, IndexError, TypeError, EOFError, MemoryError, struct.error, Image.DecompressionBombError) as error:
        raise BadImageError(name, str(error) or type(error).__name__) from error


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
        entries = sorted(_visible(self.root), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        flat = [entry.name for entry in entries if _is_image(entry)]
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
        per_class = [_images_below(self.root / folder, folder) for folder in folders]
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
            content = json.loads(file.read_text())
            labels: dict[str, int] = dict(content["labels"])
            self.labels = np.array([_whole_number(label) for label in labels.values()], dtype=np.int64)
            label_names = content.get("label_names")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f'{file}: cannot be read ({error}); expected {{"labels": {{"000000.png": 3}}, "label_names": [...]}}'
            ) from error
        if not labels:
            raise UserError(f"{file}: lists no images")
        present = {entry.name for entry in _visible(self.root)}
        for name in labels:
            if name not in present and not (self.root / name).is_file():
                raise UserError(f"{self.root / name}: is missing, but {file.name} lists it; restore it or take it off the list")
        self.label_names = names_of_labels(str(file), self.labels, label_names)
        return list(labels)


class ParquetSource(ImageSource):
    """Rows of parquet files, in the order of sorted file names; kept by `datasets` as a memory-mapped Arrow file in its cache."""

    def __init__(self, spec: str, pattern: str) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]
        from datasets import Features

        self.spec = spec
        path = Path(pattern).expanduser()
        self.files = sorted(glob.glob(str(path / "*.parquet" if path.is_dir() else path), recursive=True))  # noqa: PTH207
        if not self.files:
            raise UserError(f"{spec}: no file matches; give parquet:GLOB, for example parquet:data/train-*.parquet (quoted)")
        self.row_counts = [_num_rows(file) for file in self.files]
        features = Features.from_arrow_schema(pyarrow.parquet.read_schema(self.files[0]))
        self.image_column = _image_column(self.files[0], features)
        self.label_column = _label_column(self.files[0], features, self.image_column)
        self._data = _load_parquet(self.files, [c for c in (self.image_column, self.label_column) if c is not None])
        self._column: Any = None
        if not len(self._data):
            raise UserError(f"{spec}: the files hold no rows")
        self.labels, self.label_names = self._labels(features)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self._bytes_or_path(index), self.name(index))

    def _bytes_or_path(self, index: int) -> Any:
        if self._column is None:
            self._column = self._data.data.column(self.image_column)
        value = self._column[index].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path is None:
            raise BadImageError(self.name(index), "the row holds no image")
        return io.BytesIO(data) if data is not None else path

    def _open_bytes(self, index: int) -> Any:
        found = self._bytes_or_path(index)
        return found if isinstance(found, io.BytesIO) else Path(found).open("rb")

    def name(self, index: int) -> str:
        ends = np.cumsum(self.row_counts)
        file = int(np.searchsorted(ends, index, side="right"))
        return f"{self.files[file]}: row {index - int(ends[file]) + self.row_counts[file]}"

    def fingerprint(self) -> str:
        files = [(Path(file).name, Path(file).stat().st_size) for file in self.files]
        return digest_of("parquet", np.array(json.dumps([files, self.row_counts])), self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(b"parquet")
        for index in track(range(len(self)), len(self), "hashing", show=show_progress):
            with self._open_bytes(index) as file:  # the rows that are used, not the files: `datasets` may hold older ones
                digest.update(hashlib.sha256(file.read()).digest())
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        return count_formats(self._open_bytes(int(index)) for index in spread(len(self)))

    def encoded_bytes(self) -> int | None:
        import pyarrow
        import pyarrow.compute  # type: ignore[import-untyped]

        column = self._data.data.column(self.image_column)
        if pyarrow.types.is_struct(column.type):
            column = pyarrow.compute.struct_field(column, "bytes")
        # a row may hold a path instead of an image
        return None if column.null_count else int(pyarrow.compute.sum(pyarrow.compute.binary_length(column)).as_py())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}

    def _labels(self, features: Any) -> tuple[np.ndarray, list[str]]:
        if self.label_column is None:
            return np.zeros(len(self._data), dtype=np.int64), ["all"]
        column = self._data.data.column(self.label_column)
        if column.null_count:
            raise UserError(
                f"{self.files[0]}: column {self.label_column} has {column.null_count} rows without a label; leave such rows out"
            )
        labels = column.to_numpy().astype(np.int64)
        where = f"{self.spec}: column {self.label_column}"
        return labels, names_of_labels(where, labels, getattr(features[self.label_column], "names", None))


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
                self.images = _open_member(self.path, "arr_0.npy")
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
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
        self.images = _open_member(self.path, "arr_0.npy")


SCHEMES: dict[str, Any] = {"digits": DigitsSource, "folder": FolderSource, "parquet": ParquetSource, "npz": NpzSource}
_ARGUMENTS = {"digits": "first", "folder": "PATH", "parquet": "GLOB", "npz": "FILE"}


def _open_path(spec: str) -> ImageSource:
    path = Path(spec).expanduser()
    if path.is_dir():
        return FolderSource(spec, spec)
    if path.suffix == ".npz":
        return NpzSource(spec, spec)
    if path.suffix == ".parquet":
        return ParquetSource(spec, spec)
    raise UserError(f"{spec}: a file of this kind is no data set; give a folder, a .parquet or a .npz file")


def _unknown(spec: str, scheme: str) -> str:
    known = "digits, digits:first, digits:second, folder:PATH, parquet:GLOB, npz:FILE"
    if "/" in scheme or "\\" in scheme or scheme.startswith(("~", ".")):
        return f"{spec}: no such file or folder; data can be {known}"
    near = difflib.get_close_matches(scheme, SCHEMES, n=1)
    return f"{spec}: unknown kind of data{f', did you mean {near[0]}?' if near else ';'} data can be {known}, or an existing path"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no stated range; write it as 8-bit PNG")
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, as Pillow does for 16-bit colour
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its pixels are 32-bit numbers of no stated range; write it as 8-bit or 16-bit PNG")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # keeps Pillow from warning
    return image.convert("RGB")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()


def _images_below(folder: Path, prefix: str) -> list[str]:
    """Names of all images in a folder and below, relative to the root, sorted."""
    names = []
    for entry in _visible(folder):
        if entry.is_dir():
            names += _images_below(folder / entry.name, f"{prefix}/{entry.name}")
        elif _is_image(entry):
            names.append(f"{prefix}/{entry.name}")
    return sorted(names)


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"label {value!r} is not a whole number")
    return value


def names_of_labels(where: str, labels: np.ndarray, names: Any) -> list[str]:
    """The names, after a check that every label has one; numbers where no names are known."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise UserError(f"{where}: has the label {lowest}, labels start at 0 (is it an unlabelled split?); leave such images out")
    if names is None:
        return [str(label) for label in range(highest + 1)]
    if highest >= len(names):
        raise UserError(f"{where}: has the label {highest}, but names for {len(names)} classes only; add the names or mend the label")
    return [str(name) for name in names]


def _num_rows(file: str) -> int:
    import pyarrow

    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a parquet file, or damaged ({one_line(error)}); write or copy it again") from error


def _image_column(file: str, features: Any) -> str:
    from datasets import Image as ImageFeature

    for name in ("image", "img"):
        if name in features:
            return name
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if len(images) == 1:
        return str(images[0])
    raise UserError(f"{file}: no column named image or img among {', '.join(features)}; rename the column of the images")


def _label_column(file: str, features: Any, image_column: str) -> str | None:
    """None where the rows have no label."""
    for name in ("label", "labels", "fine_label"):
        if name in features:
            return name
    whole = [name for name, f in features.items() if name != image_column and "int" in str(getattr(f, "dtype", ""))]
    if len(whole) > 1:
        raise UserError(f"{file}: which of the columns {', '.join(whole)} is the label? rename it to label")
    return whole[0] if whole else None


def _load_parquet(files: list[str], columns: list[str]) -> Any:
    import datasets

    quiet = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=files, columns=columns, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"{files[0]}: cannot be read as parquet ({one_line(error.__cause__ or error)}); copy the files again") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _open_member(path: Path, member: str) -> np.ndarray:
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
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject or 0 in shape:
            raise ValueError(f"{member} is {dtype} {list(shape)}")
        return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")


def file_hash(name: str | Path) -> str:
    """sha256 of a file.

    Raises:
        UserError: it is gone.
    """
    try:
        with Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_hash(file)
    except FileNotFoundError as error:
        raise UserError(f"{name}: the file is gone; run again to read the data anew") from error


def _slow_hash(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def spread(num: int) -> np.ndarray:
    """At most FORMAT_SAMPLE indices, evenly over all."""
    return np.unique(np.linspace(0, num - 1, min(num, FORMAT_SAMPLE)).astype(np.int64))


def count_formats(files: Iterable[Any]) -> dict[str, int]:
    """Format to count, by the first bytes; what no magic number is known of counts as `other`."""
    counts: Counter[str] = Counter()
    for file in files:
        with file:
            head = file.read(12)
        counts[next((name for name, magic in MAGIC.items() if head.startswith(magic)), "other")] += 1
    return dict(counts)


def digest_of(kind: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(kind.encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
