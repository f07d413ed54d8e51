"""Sets of images as the metrics read them: every image once, in order, uint8, all of one square size."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from genvision.data.datasets import ordered_batches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.progress import Progress


class ArraySource(ImageSource):
    """Images in memory as an image source.

    Args:
        images: uint8 [N, H, W, 3].
        labels: whole numbers [N]; None when there are none.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, name: str = "array") -> None:
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
            raise UserError(f"images to be scored must be a uint8 array [N, H, W, 3], got {kind}; convert them with to_uint8")
        if labels is not None and np.shape(labels) != (len(images),):
            raise UserError(f"{len(images)} images need as many labels, got labels of shape {list(np.shape(labels))}; give one for each")
        self.spec = name
        self.images = images
        self.labels = np.zeros(len(images), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        num_classes = int(self.labels.max(initial=0)) + 1
        self.label_names = ["all"] if labels is None else [str(label) for label in range(num_classes)]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.data)
        return digest.hexdigest()

    def content_hash(self, show_progress: bool = False) -> str:
        return self.fingerprint()

    def stored_formats(self) -> dict[str, int]:
        return {"array": len(self)}


class SetBatch(NamedTuple):
    """Some images of a set."""

    indices: np.ndarray
    """int64 [B], their places in the set."""
    images: np.ndarray
    """uint8 [B, S, S, 3]"""
    labels: np.ndarray
    """int64 [B]"""


def stream_batches(
    source: ImageSource,
    image_size: int | None = None,
    *,
    batch_size: int,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
    show_progress: bool = False,
    description: str = "images",
) -> Iterator[SetBatch]:
    """Images of a set in the order of `indices`; every image once, in order, unless told.

    Args:
        image_size: side of ADM's centre crop; None takes images as they are, and they must all have the size of the first.
        indices: int64; the share of a process, say.

    Raises:
        UserError: an image cannot be read or has another size than the first.
    """
    size = find_image_size(source, image_size)
    checked = source if image_size is not None else _SameSize(source, size)
    chosen = np.arange(len(source)) if indices is None else indices
    progress = Progress(len(chosen), description, show=show_progress)
    for batch in ordered_batches(checked, size, batch_size=batch_size, num_workers=num_workers, indices=chosen):
        yield SetBatch(batch["indices"], batch["images"], batch["labels"])
        progress.advance(len(batch["images"]))
    progress.close()


def find_image_size(source: ImageSource, image_size: int | None = None) -> int:
    """`image_size` if given, else the side of the first image, which must be square."""
    if image_size is not None:
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        return image_size
    first = source.load(0)
    if first.width != first.height:
        raise UserError(f"{source.name(0)}: {first.height}x{first.width} pixels, expected a square; give --image-size to crop all images")
    return int(first.width)


def describe_labels(source: ImageSource) -> str:
    """`none` (one class or no labels), `balanced` or `unbalanced`; and whether they are sorted."""
    if len(source.label_names) < 2:
        return "none"
    counts = np.bincount(source.labels, minlength=len(source.label_names))
    balance = "balanced" if counts.min() == counts.max() else "unbalanced"
    return balance + (", sorted by class" if bool((np.diff(source.labels) >= 0).all()) else "")


class _SameSize(ImageSource):
    """A source whose images must all have one size; the first that differs is named."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size
        self.spec, self.labels, self.label_names = source.spec, source.labels, source.label_names

    def load(self, index: int) -> Image.Image:
        image = self.source.load(index)
        if image.size != (self.size, self.size):
            raise UserError(
                f"{self.name(index)}: {image.height}x{image.width} pixels, but the first image of its set has {self.size}x{self.size}; "
                "give --image-size to crop all to one size"
            )
        return image

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def content_hash(self, show_progress: bool = False) -> str:
        return self.source.content_hash(show_progress)

    def stored_formats(self) -> dict[str, int]:
        return self.source.stored_formats()
