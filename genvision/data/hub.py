"""A data set of the Hugging Face Hub, read over the network as training goes: `hub:REPOSITORY[@REVISION][:[CONFIG:]SPLIT]`.

REPOSITORY   OWNER/NAME, or a local folder in the layout of one
REVISION     a branch, tag or commit; the main branch if left out. `refs/convert/parquet` is the Hub's automatic parquet copy
CONFIG       which of several configurations; may be left out where there is one
SPLIT        train if left out

`hub:uoft-cs/cifar10`, `hub:ylecun/mnist:test`, `hub:uoft-cs/cifar100:cifar100:test`, `hub:OWNER/NAME@refs/convert/parquet:default:train`.

`datasets` finds the parquet files, the splits and the class names; rows are then read by row group. (A streaming IterableDataset with its
shuffle buffer has no random access, so it could not resume exactly on another number of processes.) Nothing is copied as a whole: what
was read last stays in the user's cache folder, CACHE_BYTES of it, for all processes of the machine.
"""

import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from genvision.data.order import SampleOrder
from genvision.data.parquet import bytes_or_path, is_remote
from genvision.data.parquet_index import DamagedFileError, open_index, read_images
from genvision.data.shared_tables import SharedTables
from genvision.data.sources import FORMAT_SAMPLE, BadImageError, ImageSource, count_formats, decode_rgb, digest_of, one_line
from genvision.errors import UserError
from genvision.progress import track
from genvision.user_cache import user_cache

CACHE_BYTES = 4 << 30
"""Row groups that are kept on disk, for each data set. It grows where a larger window is asked for."""
MAX_WINDOW = 1 << 16
MIN_BLOCKS = 64
"""Blocks of a window of the default size, at least: neighbours in a file are often alike."""
PARQUET_BRANCH = "refs/convert/parquet"
FORMAT_PIECES = 8
"""Places of the set where storage formats are looked at: all over it would fetch a row group for nearly every image."""
FORM = "hub:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]"


class HubSource(ImageSource):
    """Rows of the parquet files of one split, in the order of the files.

    Raises:
        UserError: the repository is missing, gated, out of reach, or holds no parquet files with images.
    """

    def __init__(self, spec: str, rest: str) -> None:
        self.spec = spec
        name = HubName.parse(spec, rest)
        self.files, features = _find_files(spec, name)
        self._index, identity = open_index(self.files, features)
        self._ends = self._index.ends
        self.labels, self.label_names = self._index.labels, self._index.label_names
        self._tables = SharedTables(user_cache("row_groups") / identity, CACHE_BYTES)
        self._damaged: dict[int, str] = {}
        self._read_again: set[int] = set()

    def load(self, index: int) -> Image.Image:
        try:
            return self._decode(index)
        except BadImageError:  # perhaps only what the cache holds is damaged: a disk that lost power, say
            piece, _ = self._find(index)
            if piece in self._damaged or piece in self._read_again:
                raise
            self._read_again.add(piece)
            self._tables.remove(str(piece))
        return self._decode(index)

    def _decode(self, index: int) -> Image.Image:
        with self._open(index) as file:
            return decode_rgb(file, self.name(index))

    def name(self, index: int) -> str:
        piece, place = self._find(index)
        return f"{self.files[self._index.file_number[piece]]}: row {self._index.first_row[piece] + place}"

    def fingerprint(self) -> str:
        files = np.array([PurePosixPath(file).name for file in self.files])
        return digest_of("hub", files, self._index.file_number, self._index.num_rows, self._index.num_bytes, self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(b"parquet")  # the same rows have the same hash as when they are read by parquet:
        for index in track(range(len(self)), len(self), "hashing", show=show_progress):
            with self._open(index) as file:
                digest.update(hashlib.sha256(file.read()).digest())
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        pieces = np.unique(np.linspace(0, len(self._ends) - 1, FORMAT_PIECES).astype(np.int64))
        rows = [np.arange(self._index.num_rows[piece])[: FORMAT_SAMPLE // FORMAT_PIECES] for piece in pieces]
        starts = (self._ends - self._index.num_rows)[pieces]
        return count_formats(self._open(int(index)) for start, places in zip(starts, rows, strict=True) for index in start + places)

    def order(self, window: int | None = None) -> SampleOrder:
        """By blocks of row groups, so that each row group is fetched about once an epoch; a set that fits into the cache is shuffled whole.

        Args:
            window: images that are shuffled among each other. By default as many as half the cache holds, a power of 2 up to MAX_WINDOW.
        """
        total = int(self._index.num_bytes.sum())
        if window is None and total <= CACHE_BYTES:
            return SampleOrder(len(self))
        piece_rows = int(np.median(self._index.num_rows))
        in_half_cache = CACHE_BYTES * len(self) // (2 * total + 1)
        chosen = window or max(min(MAX_WINDOW, 1 << max(in_half_cache.bit_length() - 1, 0)), piece_rows)
        # two windows, since processes are not all at the same step; an order that somebody else asked for still has its room
        self._tables.max_bytes = max(self._tables.max_bytes, CACHE_BYTES, 2 * total * min(chosen, len(self)) // len(self))
        # files end anywhere, so blocks do not fall on the bounds of pieces: with several pieces in a block few are fetched twice
        block = piece_rows * max(1, chosen // (MIN_BLOCKS * piece_rows))
        return SampleOrder(len(self), chosen, block)

    def _open(self, index: int) -> Any:
        """The image file of one row."""
        piece, place = self._find(index)
        data, path = bytes_or_path(self._column(piece, index)[place].as_py())
        if data is not None:
            return io.BytesIO(data)
        if path is None:
            raise BadImageError(self.name(index), "the row holds no image")
        if is_remote(self.files[0]):
            raise BadImageError(self.name(index), f"the row holds no image, only the path {path} on another machine")
        try:
            return Path(path).open("rb")
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise BadImageError(self.name(index), str(error)) from error

    def _column(self, piece: int, index: int) -> Any:
        if piece not in self._damaged:
            try:
                return self._tables.get(str(piece), lambda: self._read(piece)).column(0)
            except DamagedFileError as error:
                self._damaged[piece] = one_line(error)
        raise BadImageError(self.name(index), self._damaged[piece])

    def _read(self, piece: int) -> Any:
        first, num = int(self._index.first_group[piece]), int(self._index.num_groups[piece])
        return read_images(self.files[self._index.file_number[piece]], self._index.image_column, range(first, first + num))

    def _find(self, index: int) -> tuple[int, int]:
        """(piece, row in it)"""
        piece = int(np.searchsorted(self._ends, index, side="right"))
        return piece, index - int(self._ends[piece] - self._index.num_rows[piece])


class HubName(NamedTuple):
    """What stands behind `hub:`."""

    repository: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str, rest: str) -> "HubName":
        """The parts of a name; what is left out is None, and the split `train`.

        Raises:
            UserError: it has not the form of a name.
        """
        repository, *parts = rest.split(":")
        if len(parts) > 2 or not all([repository, *parts]):
            raise UserError(f"{spec}: expected {FORM}, for example hub:uoft-cs/cifar10:test")
        split, config = parts[-1] if parts else "train", parts[0] if len(parts) == 2 else None
        if wild := next((sign for sign in repository if sign in "*?["), None):  # `datasets` would look for them in other folders too
            raise UserError(f"{spec}: holds {wild} in the name of a repository; give one by its name, or rename the folder")
        if Path(repository).expanduser().is_dir():
            return cls(str(Path(repository).expanduser().resolve()), None, config, split)
        repository, at, revision = repository.partition("@")
        if repository.count("/") != 1 or repository.startswith(("/", "~", ".")) or (at and not revision):
            raise UserError(f"{spec}: {repository} is no folder here, and no name on the Hub; expected {FORM}")
        return cls(repository, revision or None, config, split)


def _find_files(spec: str, name: HubName) -> tuple[list[str], Any | None]:
    """(parquet files of the split; the features where the repository states them)"""
    from datasets.packaged_modules.parquet.parquet import Parquet

    builder = _builder(spec, name)
    if not isinstance(builder, Parquet):
        raise UserError(_no_parquet(spec, name))
    by_split = builder.config.data_files
    if name.split not in by_split:
        raise UserError(f"{spec}: has no split {name.split}; choose {' or '.join(by_split)}")
    files = [str(file) for file in by_split[name.split]]
    if name.revision == PARQUET_BRANCH:
        configs = sorted({PurePosixPath(file).parent.parent.name for file in files})  # CONFIG/SPLIT/0000.parquet
        if len(configs) > 1:
            raise UserError(f"{spec}: holds the configurations {', '.join(configs)}; name one, {spec}:{configs[0]}:{name.split}")
        if any(PurePosixPath(file).parent.name.startswith("partial-") for file in files):
            print(f"warning: {spec}: the Hub converted only the first part of this split to parquet", file=sys.stderr, flush=True)
    return files, builder.info.features


def _builder(spec: str, name: HubName) -> Any:
    """What `datasets` makes of the repository: where its files are, not yet their content.

    Raises:
        UserError: it is missing, gated, out of reach, or of another kind.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HTTPError

    of_branch = name.revision == PARQUET_BRANCH  # it states no configurations: each has a folder
    try:
        with _no_bars():
            return datasets.load_dataset_builder(
                name.repository,
                name=None if of_branch else name.config,
                data_dir=name.config if of_branch else None,
                revision=name.revision,
            )
    except DatasetNotFoundError as error:  # missing, gated, or no such revision: the message says which
        mend = "check the name; if you need access, ask for it on its page and log in by hf auth login"
        raise UserError(f"{spec}: {one_line(error)} ({mend})") from error
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise UserError(f"{spec}: no data files found ({one_line(error)}); {_other_ways(name)}") from error
    except ValueError as error:  # no such configuration, or one has to be chosen
        raise UserError(f"{spec}: {one_line(error)}; expected {FORM}") from error
    except RuntimeError as error:  # it is made by a script, which we never run
        raise UserError(_no_parquet(spec, name)) from error
    except (HTTPError, OSError) as error:
        raise UserError(f"{spec}: the Hub cannot be reached ({one_line(error)}); check the network and HF_HUB_OFFLINE") from error


def _no_parquet(spec: str, name: HubName) -> str:
    return f"{spec}: its data are no parquet files; {_other_ways(name)}"


def _other_ways(name: HubName) -> str:
    if Path(name.repository).is_dir():
        return f"give folder:{name.repository} or wds:{name.repository}/*.tar"
    tars = f"its tar files by 'wds:hf://datasets/{name.repository}/*.tar'"
    return f"try {tars}" if name.revision == PARQUET_BRANCH else f"try hub:{name.repository}@{PARQUET_BRANCH}, or {tars}"


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of small downloads where nobody looks at a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
