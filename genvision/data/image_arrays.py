"""Images that lie in arrays, several files of them: CIFAR, MNIST, downsampled ImageNet.

A memory-mapped array takes no memory of its own. One that had to be unpacked is shared by forked workers, since it is opened before them;
pickling leaves arrays out, and they are opened anew where they are read.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genvision.data.sources import ImageSource, digest_of
from genvision.progress import track

HASH_ROWS = 64


class ArrayFile:
    """The images of one file.

    Args:
        images: uint8 [N, ...].
        reopen: gives the same array again, in another process.
        arrange: makes [H, W] or [H, W, 3] of one row of it.
    """

    def __init__(
        self, path: Path, images: np.ndarray, reopen: Callable[[], np.ndarray], arrange: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.path, self.num_images = path, len(images)
        self._images: np.ndarray | None = images
        self._reopen, self._arrange = reopen, arrange

    @property
    def images(self) -> np.ndarray:
        if self._images is None:
            self._images = self._reopen()
        return self._images

    def image(self, row: int) -> np.ndarray:
        """uint8 [H, W] or [H, W, 3]."""
        return np.ascontiguousarray(self._arrange(self.images[row]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


class ArraySource(ImageSource):
    """Images of several files, one file after the other."""

    def __init__(self, spec: str, files: Sequence[ArrayFile], labels: np.ndarray, label_names: list[str]) -> None:
        self.spec, self.files, self.labels, self.label_names = spec, files, labels, label_names
        self._ends = np.cumsum([file.num_images for file in files])
        assert len(labels) == self._ends[-1]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._image(index)).convert("RGB")

    def name(self, index: int) -> str:
        file, row = self._find(index)
        return f"{self.files[file].path}[{row}]"

    def fingerprint(self) -> str:
        facts = [f"{file.path.name} {file.num_images} {file.path.stat().st_size}" for file in self.files]
        return digest_of("arrays", np.array(facts), self._image(0), self._image(len(self) - 1), self.labels)

    def content_hash(self, show_progress: bool = False) -> str:
        digest = hashlib.sha256(f"arrays {[file.images.shape for file in self.files]}".encode())
        parts = [(file, start) for file in self.files for start in range(0, file.num_images, HASH_ROWS)]
        for file, start in track(parts, len(parts), "hashing", unit="parts", show=show_progress):
            digest.update(np.ascontiguousarray(file.images[start : start + HASH_ROWS]).data)
        digest.update(self.labels.data)
        return digest.hexdigest()

    def stored_formats(self) -> dict[str, int]:
        return {"array": len(self)}

    def _image(self, index: int) -> np.ndarray:
        file, row = self._find(index)
        return self.files[file].image(row)

    def _find(self, index: int) -> tuple[int, int]:
        """The file of an image, and its row there."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file]) + self.files[file].num_images


def planes(size: int, row: np.ndarray) -> np.ndarray:
    """[size, size, 3] of a row with all red values first, then green, then blue."""
    return row.reshape(3, size, size).transpose(1, 2, 0)


def interleaved(size: int, row: np.ndarray) -> np.ndarray:
    """[size, size, 3] of a row that has the colours of each pixel together."""
    return row.reshape(size, size, 3)
