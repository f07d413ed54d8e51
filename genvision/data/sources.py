"""Where images come from: a SPEC string names a source of labelled images with random access.

`digits`, `digits:first`, `digits:second`   scikit-learn's 1,797 handwritten digits, 8 x 8
`folder:PATH`                               one sub-folder a class; or a flat folder, labelled by its labels.json if it has one
`parquet:GLOB`                              parquet files in the Hugging Face layout (image, label)
`npz:FILE`                                  ADM's sample files: arr_0 uint8 [N, H, W, 3] and perhaps arr_1 labels
`wds:SHARDS`                                WebDataset tar shards, `x-{000..146}.tar` or a pattern, local or behind an fsspec address
`hub:NAME[@REVISION][:[CONFIG:]SPLIT]`      parquet files of the Hugging Face Hub, read over the network as they are needed
`mix:WEIGHT*SPEC;WEIGHT*SPEC...`            several sources, each seen as often as its weight says
`imagenet:ROOT`, `imagenet:ROOT:val`        ILSVRC2012 as it is handed out: train/WNID/*.JPEG, val flat or in class folders
`imagenet32:DIR`, `imagenet64:DIR:val`      downsampled ImageNet, with labels (Chrabaszcz et al.) or without (van den Oord et al.)
`lsun:DIR,DIR...`                           LSUN's lmdb folders, one a category
`idx:FILE`, `idx:DIR`, `idx:DIR:test`       MNIST, Fashion-MNIST and EMNIST, gzipped or not
`cifar:DIR`, `cifar:DIR:test`               CIFAR-10 and CIFAR-100, the pickles or the binary files

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
import hashlib
import importlib
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from genvision.data.order import Order, SampleOrder
from genvision.errors import UserError

OnBadImage = Literal["stop", "skip"]
_FILE_ERRNOS = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}  # None: raised by Pillow itself
FORMAT_SAMPLE = 1000
"""Images whose storage format is looked at."""
MAGIC = {"PNG": b"\x89PNG", "JPEG": b"\xff\xd8\xff", "BMP": b"BM", "WebP": b"RIFF"}


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

    def order(self, window: int | None = None) -> Order:
        """The order in which training reads the images; `window` of them are shuffled among each other (None: see SampleOrder)."""
        return SampleOrder(len(self), window)


def open_source(spec: str) -> ImageSource:
    """Open the images that `spec` names (the forms are at the head of this file).

    Raises:
        UserError: the form is unknown, or there are no images.
    """
    with path_errors(spec):
        return _open(spec)


def _open(spec: str) -> ImageSource:
    scheme, _, rest = spec.partition(":")
    is_named = scheme in SCHEMES and (bool(rest) or spec == "digits")  # a folder may be called imagenet
    if not is_named and Path(spec).expanduser().exists():
        return _open_path(spec)
    if scheme == "encoded":
        raise UserError(f"{spec}: holds codes, not images; give the images that it was made from (folder:, parquet:, wds:, ...)")
    if scheme not in SCHEMES:
        raise UserError(_unknown(spec, scheme))
    if scheme != "digits" and not rest:
        raise UserError(f"{spec}: nothing stands behind {scheme}:, expected {scheme}:{_ARGUMENTS[scheme]}")
    return _create(scheme, spec, rest)


def open_image(path: str | Path) -> Image.Image:
    """One image file as RGB.

    Raises:
        UserError: there is no such file.
        BadImageError: it cannot be decoded.
    """
    with path_errors(str(path)):
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


SCHEMES: dict[str, tuple[str, str]] = {
    "digits": ("genvision.data.image_files", "DigitsSource"),
    "folder": ("genvision.data.image_files", "FolderSource"),
    "parquet": ("genvision.data.parquet", "ParquetSource"),
    "npz": ("genvision.data.npz", "NpzSource"),
    "wds": ("genvision.data.tar_shards", "TarShardSource"),
    "hub": ("genvision.data.hub", "HubSource"),
    "mix": ("genvision.data.mixture", "MixedSource"),
    "imagenet": ("genvision.data.imagenet", "ImageNetSource"),
    "imagenet32": ("genvision.data.small_imagenet", "open_small_imagenet"),
    "imagenet64": ("genvision.data.small_imagenet", "open_small_imagenet"),
    "lsun": ("genvision.data.lsun", "LsunSource"),
    "idx": ("genvision.data.idx_files", "IdxSource"),
    "cifar": ("genvision.data.cifar", "CifarSource"),
}
"""Module, and its class or function, of each form of data; imported when it is opened: some need libraries that others do without."""
_ARGUMENTS = {
    "digits": "first",
    "folder": "PATH",
    "parquet": "GLOB",
    "npz": "FILE",
    "wds": "SHARDS",
    "hub": "NAME:SPLIT",
    "mix": "WEIGHT*SPEC;WEIGHT*SPEC",
    "imagenet": "ROOT",
    "imagenet32": "DIR",
    "imagenet64": "DIR",
    "lsun": "DIR",
    "idx": "FILE",
    "cifar": "DIR",
}


def _create(scheme: str, spec: str, rest: str) -> ImageSource:
    module, name = SCHEMES[scheme]
    source: ImageSource = getattr(importlib.import_module(module), name)(spec, rest)
    return source


def _open_path(spec: str) -> ImageSource:
    path = Path(spec).expanduser()
    if path.is_dir():
        return _create("folder", spec, spec)
    if path.suffix in (".npz", ".parquet"):
        return _create(path.suffix[1:], spec, spec)
    raise UserError(f"{spec}: a file of this kind is no data set; give a folder, a .parquet or a .npz file")


def _unknown(spec: str, scheme: str) -> str:
    known = ", ".join(["digits", *(f"{name}:{argument}" for name, argument in _ARGUMENTS.items())])
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


@contextmanager
def path_errors(spec: str) -> Iterator[None]:
    """What the system says of paths that cannot be opened becomes a UserError: too long, not allowed, links in a circle, no such user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{spec[:200]}: {one_line(error)}; check the path") from error
    except RuntimeError as error:
        if "home directory" not in str(error):  # `~name`, where there is no such user
            raise
        raise UserError(f"{spec[:200]}: {one_line(error)}; check the path") from error


def path_and_part(spec: str, rest: str, parts: tuple[str, ...]) -> tuple[Path, str]:
    """The path and the part of a data set in `PATH` or `PATH:PART`; the first part unless told.

    Raises:
        UserError: there is no such path, or no such part.
    """
    path, _, part = rest.rpartition(":")
    if part in parts and path:
        found = Path(path).expanduser()
    elif path and not Path(rest).expanduser().exists() and Path(path).expanduser().exists():
        raise UserError(f"{spec}: has no part '{part}'; choose {' or '.join(parts)}")
    else:
        found, part = Path(rest).expanduser(), parts[0]
    if not found.exists():
        raise UserError(f"{found}: no such file or folder; give {spec.partition(':')[0]}:PATH or PATH:{parts[-1]}")
    return found, part


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
