"""Images in the rows of parquet files, in the layout of Hugging Face data sets."""

import glob
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genvision.data.class_names import names_of_labels
from genvision.data.sources import BadImageError, ImageSource, count_formats, decode_rgb, digest_of, one_line, spread
from genvision.errors import UserError
from genvision.progress import track


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
        self.image_column = find_image_column(self.files[0], features)
        self.label_column = find_label_column(self.files[0], features, self.image_column)
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
        data, path = bytes_or_path(self._column[index].as_py())
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
        is_bytes = pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
        return None if column.null_count or not is_bytes else int(pyarrow.compute.sum(pyarrow.compute.binary_length(column)).as_py())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}

    def _labels(self, features: Any) -> tuple[np.ndarray, list[str]]:
        if self.label_column is None:
            return np.zeros(len(self._data), dtype=np.int64), ["all"]
        column = self._data.data.column(self.label_column)
        labels = labels_of(self.files[0], self.label_column, column)
        where = f"{self.spec}: column {self.label_column}"
        return labels, names_of_labels(where, labels, getattr(features[self.label_column], "names", None))


def _num_rows(file: str) -> int:
    import pyarrow

    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a parquet file, or damaged ({one_line(error)}); write or copy it again") from error


def find_image_column(file: str, features: Any) -> str:
    from datasets import Image as ImageFeature

    for name in ("image", "img"):
        if name in features:
            return name
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if len(images) == 1:
        return str(images[0])
    raise UserError(f"{file}: no column named image or img among {', '.join(features)}; {mend(file, 'rename the column of the images')}")


def find_label_column(file: str, features: Any, image_column: str) -> str | None:
    """None where the rows have no label."""
    for name in ("label", "labels", "fine_label"):
        if name in features:
            return name
    whole = [name for name, f in features.items() if name != image_column and "int" in str(getattr(f, "dtype", ""))]
    if len(whole) > 1:
        raise UserError(f"{file}: which of the columns {', '.join(whole)} is the label? {mend(file, 'rename it to label')}")
    return whole[0] if whole else None


def labels_of(file: str, name: str, column: Any) -> np.ndarray:
    """int64 [N] of an Arrow column.

    Raises:
        UserError: they are no whole numbers, or one is missing.
    """
    import pyarrow

    if not pyarrow.types.is_integer(column.type):
        raise UserError(f"{file}: column {name} is {column.type}, expected whole numbers; give a data set with one label an image")
    if column.null_count:
        raise UserError(f"{file}: column {name} has {column.null_count} rows without a label; {mend(file, 'leave such rows out')}")
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    return labels


def bytes_or_path(value: Any) -> tuple[bytes | None, str | None]:
    """What a row holds of its image: an encoded file, or the path of one, alone or in Hugging Face's pair of both; or nothing."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    return data if isinstance(data, bytes) else None, path if isinstance(path, str) else None


def mend(file: str, own: str) -> str:
    """What to do about a file: `own` if it is here, where it can be changed."""
    return "choose another split or data set" if is_remote(file) else own


def is_remote(file: str) -> bool:
    return "://" in file


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
