"""Where the images of parquet files lie: which row groups there are, and the label of every row.

Found once from the ends of the files and their label columns, and kept in the user's cache folder. Row groups are read in pieces: runs of
consecutive row groups of one file that take about PIECE_BYTES, or a single larger one.
Files are local paths, or addresses of fsspec such as hf://datasets/OWNER/NAME@COMMIT/FILE.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genvision.data.array_files import alone, write_whole
from genvision.data.class_names import names_of_labels
from genvision.data.npz import DAMAGED_NPZ
from genvision.data.parquet import find_image_column, find_label_column, is_remote, labels_of, mend
from genvision.data.sources import digest_of, one_line
from genvision.errors import UserError
from genvision.progress import track
from genvision.user_cache import user_cache

PIECE_BYTES = 8 << 20
"""A request over the network should fetch about this much; a row group of 100 small images is far less."""
INDEX_THREADS = 16
"""The ends of files are small: reading them is waiting for the network."""


@dataclass(frozen=True)
class ParquetIndex:
    """Pieces [P] and labels [N] of the rows of some parquet files."""

    labels: np.ndarray
    """int64 [N]"""
    label_names: list[str]
    image_column: str
    file_number: np.ndarray
    """int64 [P]: which of the files it lies in."""
    first_group: np.ndarray
    """int64 [P]: its first row group in the file."""
    num_groups: np.ndarray
    """int64 [P]"""
    first_row: np.ndarray
    """int64 [P]: its first row in the file."""
    num_rows: np.ndarray
    """int64 [P]"""
    num_bytes: np.ndarray
    """int64 [P]: of its images, decompressed."""

    @property
    def ends(self) -> np.ndarray:
        """int64 [P]: rows up to the end of each piece, over all files."""
        return np.cumsum(self.num_rows)


def open_index(files: Sequence[str], features: Any | None) -> tuple[ParquetIndex, str]:
    """The index of the rows of `files`, in this order, and a name that changes with the files.

    Args:
        features: `datasets.Features` if known from elsewhere than the files.

    Raises:
        UserError: a file is damaged or cannot be reached, or there is no column of images, or a row without a label.
    """
    facts = [[str(file), *_stamp(file)] for file in files]
    identity = digest_of("parquet index", np.array(json.dumps([facts, PIECE_BYTES, features and features.to_dict()])))[:32]
    path = user_cache("shard_indexes") / f"parquet-{identity}.npz"
    index = _stored(path)
    if index is not None:
        return index, identity
    with alone(path):
        index = _stored(path)  # another process may have listed them meanwhile
        if index is not None:
            return index, identity
        index = _build(files, features)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: _store(index, file))
        except OSError as error:
            print(
                f"warning: {path}: cannot be written ({error.strerror or one_line(error)}); they are listed again next time",
                file=sys.stderr,
                flush=True,
            )
    return index, identity


def read_images(file: str, image_column: str, groups: Sequence[int]) -> Any:
    """The column of images of some row groups, as an Arrow table.

    Raises:
        DamagedFileError: what is stored there is damaged.
        UserError: the file cannot be reached.
    """
    with _parquet(file) as content:
        return content.read_row_groups(list(groups), columns=[image_column], use_threads=False)


class DamagedFileError(UserError):
    """A parquet file, or a part of one, that holds no valid data."""


@contextmanager
def _parquet(file: str) -> Iterator[Any]:
    """An open file; errors while it is in use are told in one line."""
    import fsspec  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]
    from huggingface_hub.errors import HTTPError

    try:
        if not is_remote(file):
            with pyarrow.parquet.ParquetFile(file, pre_buffer=True) as content:
                yield content
            return
        # pre_buffer joins what is asked for into large requests, so the file itself must not read ahead
        system, path = fsspec.core.url_to_fs(file)
        with system.open(path, "rb", cache_type="none") as stream, pyarrow.parquet.ParquetFile(stream, pre_buffer=True) as content:
            yield content
    except FileNotFoundError as error:
        raise UserError(f"{file}: the file is gone; run again to look for the data anew") from error
    except (pyarrow.ArrowException, OSError, HTTPError) as error:
        # Arrow reports damage as its own exceptions or as a bare OSError; those of disks and networks have a number or a class of their own
        if isinstance(error, pyarrow.ArrowException) or (type(error) is OSError and error.errno is None):
            raise DamagedFileError(
                f"{file}: is damaged, or no parquet file ({one_line(error)}); {mend(file, 'write or copy it again')}"
            ) from error
        raise UserError(f"{file}: cannot be read ({one_line(error)}); check the disk or network, then run again") from error


def _stamp(file: str) -> list[int]:
    """What changes with the content; the address of a file on the Hub names its commit."""
    if is_remote(file):
        return []
    stat = Path(file).stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # `cp -p` gives a new file the time of an old one


def _build(files: Sequence[str], features: Any | None) -> ParquetIndex:
    from datasets import Features

    if features is None:
        with _parquet(files[0]) as content:
            features = Features.from_arrow_schema(content.schema_arrow)
    image_column = find_image_column(files[0], features)
    label_column = find_label_column(files[0], features, image_column)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        rows = pool.map(lambda file: _read_rows(file, image_column, label_column), files)
        show = len(files) > INDEX_THREADS and os.environ.get("RANK", "0") == "0"
        found = list(track(rows, len(files), "listing parquet files", unit="files", show=show))
    labels = np.concatenate([labels for labels, _ in found])
    if not len(labels):
        raise UserError(f"{files[0]}: the files of this split hold no rows; choose another split")
    if label_column is None:
        names = ["all"]
    else:
        names = names_of_labels(f"{files[0]}: column {label_column}", labels, getattr(features[label_column], "names", None))
    pieces = np.concatenate([np.insert(_pieces(groups), 0, number, axis=1) for number, (_, groups) in enumerate(found)])
    return ParquetIndex(labels, names, image_column, *np.ascontiguousarray(pieces.T))


def _read_rows(file: str, image_column: str, label_column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64 [n], rows and bytes of each row group int64 [G, 2])"""
    with _parquet(file) as content:
        for column in (image_column, label_column):
            if column is not None and column not in content.schema_arrow.names:
                raise UserError(
                    f"{file}: has no column {column}, as other files of the split have; {mend(file, 'mend or remove the file')}"
                )
        groups = [content.metadata.row_group(number) for number in range(content.metadata.num_row_groups)]
        sizes = [[group.num_rows, _image_bytes(group, image_column)] for group in groups]
        if label_column is None:
            return np.zeros(content.metadata.num_rows, dtype=np.int64), np.array(sizes, dtype=np.int64).reshape(-1, 2)
        column = content.read(columns=[label_column], use_threads=False).column(0)
    return labels_of(file, label_column, column), np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _image_bytes(group: Any, image_column: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == image_column)


def _pieces(groups: np.ndarray) -> np.ndarray:
    """[first group, number of groups, first row, rows, bytes] of each piece of one file, from the rows and bytes of its row groups."""
    pieces: list[list[int]] = []
    row = 0
    for number, (num_rows, num_bytes) in enumerate(groups.tolist()):
        if pieces and pieces[-1][4] + num_bytes <= PIECE_BYTES:
            pieces[-1][1] += 1
            pieces[-1][3] += num_rows
            pieces[-1][4] += num_bytes
        else:
            pieces.append([number, 1, row, num_rows, num_bytes])
        row += num_rows
    return np.array(pieces, dtype=np.int64).reshape(-1, 5)


def _store(index: ParquetIndex, file: Any) -> None:
    values = asdict(index).items()
    arrays: dict[str, Any] = {name: value if isinstance(value, np.ndarray) else np.array(json.dumps(value)) for name, value in values}
    np.savez(file, **arrays)


def _stored(path: Path) -> ParquetIndex | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return ParquetIndex(**{name: json.loads(str(array)) if array.dtype.kind == "U" else array for name, array in file.items()})
    except FileNotFoundError:
        return None
    except DAMAGED_NPZ as error:
        print(f"warning: {path}: is damaged ({one_line(error)}); the files are listed again", file=sys.stderr, flush=True)
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
