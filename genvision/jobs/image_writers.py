"""Writing the images of a job: a folder of PNG files, one npz or one grid; what is there is kept, and two jobs are never mixed."""

import glob
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from genvision.errors import UserError
from genvision.images import make_grid, save_npz, save_png
from genvision.training.state import write_atomically

GRID_COLUMNS = 8


class Request(Protocol):
    """Which images are wanted."""

    @property
    def num(self) -> int:
        """How many."""

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """int64 [B], classes of the images of these numbers, 0 .. num - 1."""


def open_writer(out: Path, job: dict[str, Any], label_names: list[str], request: Request) -> "FolderWriter | FileWriter":
    """The writer that the name of `out` asks for: a folder, `*.npz` or `*.png` (a grid).

    Args:
        job: what identifies the job; another job's results in the same place are refused.

    Raises:
        UserError: it is another format.
    """
    if out.suffix in (".npz", ".png"):
        return FileWriter(out, job, request, label_names)
    if out.suffix[1:].isalpha() and not out.is_dir():  # but `samples_cfg1.5` is a folder
        raise UserError(f"{out}: '{out.suffix}' is no format for images; give a folder, *.npz or *.png")
    return FolderWriter(out, job, request, label_names)


def _check_job(path: Path, job: dict[str, Any], out: Path, occupied: bool) -> None:
    """Refuse to mix two jobs; `path` holds the description of the one that wrote `out`."""
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            old = {}
        changed = sorted(key for key in job.keys() | old.keys() if job.get(key) != old.get(key))
        if changed:
            raise UserError(f"{out}: already holds another job's results (it differs in {', '.join(changed)}); choose another --out")
    elif occupied:
        raise UserError(f"{out}: already holds something else; choose another --out")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(job, indent=2) + "\n")


def _is_leftover(path: Path) -> bool:
    """What a process leaves that is killed while it writes a file."""
    return path.name.startswith(".") and path.name.endswith(".part")


def _check_kept(folder: Path) -> None:
    """Raises UserError if what `prepare` made is there no more: a new folder would hold a part of the images and no description."""
    if not folder.is_dir():
        raise UserError(f"{folder}: was removed while the job wrote into it; run the same command again")


class FolderWriter:
    """`000000.png`, `000001.png`, ... with `labels.json` and `job.json`."""

    def __init__(self, out: Path, job: dict[str, Any], request: Request, label_names: list[str]) -> None:
        self.out, self.job, self.request, self.label_names = out, job, request, label_names

    def prepare(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; give a folder, *.npz or *.png")
        present = list(self.out.iterdir()) if self.out.is_dir() else []
        leftovers = [path for path in present if _is_leftover(path)]
        _check_job(self.out / "job.json", self.job, self.out, len(present) > len(leftovers))
        for path in leftovers:
            path.unlink()

    def _path(self, index: int) -> Path:
        return self.out / f"{index:06d}.png"

    def has(self, chunk: range) -> bool:
        return all(self._path(i).is_file() for i in chunk)

    def write(self, chunk: range, images: np.ndarray) -> None:
        for write in self.files(chunk, images):
            write()

    def files(self, chunk: range, images: np.ndarray) -> list[Callable[[], None]]:
        """What writes each file of a chunk; in any order, on any thread."""
        return [partial(self._save, i, image) for i, image in zip(chunk, images, strict=True)]

    def _save(self, index: int, image: np.ndarray) -> None:
        _check_kept(self.out)
        save_png(image, self._path(index))

    def finish(self, chunks: list[range]) -> None:
        if not all(map(self.has, chunks)):
            raise UserError(f"{self.out}: images that were written are gone; run the same command again")
        labels = self.request.labels_of(range(self.request.num)).tolist()
        content = {"label_names": self.label_names, "labels": {self._path(i).name: label for i, label in enumerate(labels)}}
        write_atomically(self.out / "labels.json", json.dumps(content) + "\n")


class FileWriter:
    """One npz or one grid; its description stands beside it as `NAME.json`."""

    def __init__(self, out: Path, job: dict[str, Any], request: Request, label_names: list[str]) -> None:
        self.out, self.job, self.request, self.label_names = out, job, request, label_names
        self.parts = out.with_name(out.name + ".parts")

    def prepare(self) -> None:
        _check_job(self.out.with_name(self.out.name + ".json"), self.job, self.out, self.out.exists())
        for path in self.out.parent.glob(f".{glob.escape(self.out.name)}*.part"):
            path.unlink()
        if self.out.exists():
            shutil.rmtree(self.parts, ignore_errors=True)
        else:
            self.parts.mkdir(parents=True, exist_ok=True)

    def _path(self, chunk: range) -> Path:
        return self.parts / f"{chunk.start:06d}-{chunk.stop:06d}.npy"

    def has(self, chunk: range) -> bool:
        return self.out.exists() or self._path(chunk).is_file()

    def write(self, chunk: range, images: np.ndarray) -> None:
        _check_kept(self.parts)
        part = self._path(chunk).with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, images)
        part.replace(self._path(chunk))

    def files(self, chunk: range, images: np.ndarray) -> list[Callable[[], None]]:
        """What writes the one file of a chunk."""
        return [partial(self.write, chunk, images)]

    def finish(self, chunks: list[range]) -> None:
        if self.out.exists():
            return
        if not all(map(self.has, chunks)):
            raise UserError(f"{self.parts}: images that were written are gone; run the same command again")
        images = np.concatenate([np.load(self._path(chunk), allow_pickle=False) for chunk in chunks])
        labels = self.request.labels_of(range(self.request.num)).numpy()
        if self.out.suffix == ".npz":
            save_npz(self.out, images, labels)
        else:
            order, names, columns = self._grid_order(labels)
            save_png(make_grid(images[order], columns, row_names=names), self.out)
        shutil.rmtree(self.parts)

    def _grid_order(self, labels: np.ndarray) -> tuple[np.ndarray, list[str] | None, int]:
        """A class a row where all have equally many images; as they come otherwise."""
        order = np.argsort(labels, kind="stable")
        present, counts = np.unique(labels, return_counts=True)
        if len(set(counts)) == 1 and counts[0] <= 2 * GRID_COLUMNS and len(present) > 1:
            return order, [self.label_names[i] for i in present], int(counts[0])
        return np.arange(len(labels)), None, min(GRID_COLUMNS, len(labels))
