"""Streams of batches: for training in an order that needs no replay, and every image once for measuring and encoding.

Shapes: B images of one process, H = W = image size, V views of an image.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from genvision.data.order import Order, local_batch_size, sample_positions, sample_rng, uniform_choice, view_seed
from genvision.data.sources import BadImageError, ImageSource, OnBadImage
from genvision.data.transforms import MIN_AREA, Crop, CropConfig, ViewConfig, center_crop
from genvision.data.workers import DeadWorkerError, map_in_order
from genvision.errors import UserError
from genvision.images import from_uint8

Batch = dict[str, Tensor]
BadImages = dict[int, str]
"""Index of an unreadable image to `name: reason`."""
MAX_CACHE_BYTES = 64 << 20
"""Sets whose centre crops fit in this are decoded once a process."""
MAX_RESTARTS = 3
"""Times that new workers take the place of dead ones without a batch in between."""


class TrainingData(Protocol):
    """What `batches` reads from: images or codes."""

    label_names: list[str]
    bad_images: BadImages

    @property
    def order(self) -> Order: ...

    @property
    def highest_label(self) -> int: ...

    def __len__(self) -> int: ...

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch: ...


class ImageDataset:
    """Images of a source as training tensors.

    Args:
        image_size: side of the tensors.
        crop: `center`, `random` or `resized`.
        flip: mirror half of the images.
        enlarge_range, min_area: see CropConfig.
        seed: crop and flip of a sample depend on this and its position alone.
        views: of each image in a batch; 2 for a contrastive loss. The first is what one view would be; the second has a crop and flip of
            its own, or is the mirror image of a centre crop.
        on_bad_image: `skip` puts the next readable image in the place of an unreadable one and notes it in `bad_images`.
        shuffle_window: images that are shuffled among each other, see SampleOrder.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        crop: Crop = "center",
        flip: bool = True,
        enlarge_range: tuple[float, float] = (1.0, 1.25),
        min_area: float = MIN_AREA,
        seed: int = 0,
        views: Literal[1, 2] = 1,
        on_bad_image: OnBadImage = "stop",
        shuffle_window: int | None = None,
    ) -> None:
        self.source, self.image_size, self.seed, self.on_bad_image = source, image_size, seed, on_bad_image
        self.crops, self.batch_views = CropConfig(crop=crop, flip=flip, enlarge_range=enlarge_range, min_area=min_area), views
        if views == 2 and crop == "center" and not flip:
            raise UserError("data.views 2: centre crops without flips are the same twice; set data.crop to random, or data.flip to true")
        self.labels, self.label_names = source.labels, source.label_names
        self.order: Order = source.order(shuffle_window)
        self.bad_images: BadImages = {}
        small = len(source) * image_size * image_size * 3 <= MAX_CACHE_BYTES
        self._cached = _CropCache(len(source), image_size) if small and crop == "center" else None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def highest_label(self) -> int:
        return int(self.labels.max())

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def get(self, position: int, index: int) -> Batch:
        """One sample: `images` float32 [3, H, W] in [-1, 1], `labels` and `positions` int64 []."""
        return {key: value[0] for key, value in self.get_batch(np.array([position]), np.array([index])).items()}

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """`images` float32 [B, 3, H, W] in [-1, 1], or [B, 2, 3, H, W] of two views; `labels` and `positions` int64 [B].

        Raises:
            BadImageError: an image cannot be decoded, and none may be skipped or none is left.
        """
        positions, indices = np.array(positions, dtype=np.int64), np.asarray(indices)
        if self._cached is not None:
            used, images = self._cached.take(indices, self._centered)
        elif self.crops.crop == "center":
            used, images = _stacked([self._centered(index) for index in indices.tolist()])
        else:
            used, images = _stacked([self._cropped(*pair) for pair in zip(indices.tolist(), positions.tolist(), strict=True)])
        if self.batch_views > images.shape[1]:
            images = images.repeat(self.batch_views, axis=1)
        if self.crops.flip:
            mirrored = self._mirrored(positions)
            images[mirrored] = images[mirrored, :, ::-1]
        tensors = from_uint8(images.reshape(-1, *images.shape[2:])).unflatten(0, images.shape[:2])  # [B, V, 3, H, W]
        return {
            "images": tensors if self.batch_views == 2 else tensors[:, 0],
            "labels": torch.from_numpy(self.labels[used]),
            "positions": torch.from_numpy(positions),
        }

    def plain(self, index: int) -> Tensor:
        """The centre crop of one image, never mirrored: float32 [3, H, W] in [-1, 1]."""
        _, image = self._readable(index)
        return from_uint8(np.asarray(center_crop(image, self.image_size))[None])[0]

    def _centered(self, index: int) -> tuple[int, np.ndarray]:
        """The image at `index` or the next readable one: its own index, and uint8 [1, H, W, 3]."""
        index, image = self._readable(index)
        return index, np.asarray(center_crop(image, self.image_size))[None]

    def _cropped(self, index: int, position: int) -> tuple[int, np.ndarray]:
        """The same, of random crops: [V, H, W, 3]."""
        index, image = self._readable(index)
        rngs = [sample_rng(view_seed(self.seed, view), position) for view in range(self.batch_views)]
        return index, np.stack([np.asarray(self.crops.apply(image, self.image_size, rng)) for rng in rngs])

    def _mirrored(self, positions: np.ndarray) -> np.ndarray:
        """Which views are mirrored, boolean [B, V]."""
        first = uniform_choice(self.seed, positions, 2) == 1
        if self.batch_views == 1:
            return first[:, None]
        is_free = self.crops.crop != "center"  # the flip is all in which two centre crops can differ
        second = uniform_choice(view_seed(self.seed, 1), positions, 2) == 1 if is_free else ~first
        return np.stack([first, second], axis=1)

    def _readable(self, index: int) -> tuple[int, Any]:
        for tried in range(len(self)):
            candidate = (index + tried) % len(self)
            try:
                return candidate, self.source.load(candidate)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise
                self.bad_images[candidate] = f"{error.name}: {error.reason}"
        raise UserError(f"{self.source.spec}: not one of its {len(self)} images can be read; check the files")


def _stacked(pairs: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([index for index, _ in pairs]), np.stack([images for _, images in pairs])


class _CropCache:
    """Crops that do not depend on the position, kept after their first use: small sets are decoded once."""

    def __init__(self, num: int, size: int) -> None:
        self.num, self.size = num, size
        self.images: np.ndarray | None = None

    def take(self, indices: np.ndarray, crop: Callable[[int], tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """(own indices [B], uint8 [B, 1, H, W, 3])"""
        if self.images is None:
            self.images = np.zeros((self.num, 1, self.size, self.size, 3), dtype=np.uint8)
            self.used = np.full(self.num, -1, dtype=np.int64)
        for index in np.unique(indices[self.used[indices] < 0]).tolist():
            self.used[index], self.images[index] = crop(index)
        return self.used[indices], self.images[indices]

    def __getstate__(self) -> dict[str, Any]:
        return {"num": self.num, "size": self.size, "images": None}


class BatchStream:
    """The batches of one process from `start_step` on. Every iteration begins there anew.

    `bad_images` grows while images are skipped, whichever process decodes them.
    """

    def __init__(
        self,
        dataset: TrainingData,
        *,
        seed: int,
        start_step: int,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        end_step: int | None,
        pin_memory: bool,
    ) -> None:
        local_batch_size(batch_size, world_size)  # complain now, not at the first batch
        self.fetch = _FetchStep(dataset, seed, batch_size, rank, world_size)
        self.start_step, self.end_step, self.num_workers, self.pin_memory = start_step, end_step, num_workers, pin_memory
        self.bad_images: BadImages = {}

    def __iter__(self) -> Iterator[Batch]:
        step, restarts = self.start_step, 0
        while True:
            try:
                steps = itertools.count(step) if self.end_step is None else range(step, self.end_step)
                for batch, bad in map_in_order(self.fetch, steps, self.num_workers, pin_memory=self.pin_memory):
                    self.bad_images |= bad
                    yield batch
                    step, restarts = step + 1, 0
                return
            except DeadWorkerError as error:
                # a batch is a function of its step, so new workers make the very batches that are lost
                if restarts == MAX_RESTARTS:
                    raise
                restarts += 1
                print(f"step {step}: {error.what}; new ones go on from this step", file=sys.stderr, flush=True)


def batches(
    dataset: TrainingData,
    *,
    seed: int,
    start_step: int = 0,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    end_step: int | None = None,
    pin_memory: bool = False,
) -> BatchStream:
    """Training batches of one process, without end unless `end_step` (not included) is given.

    What comes at a step depends on (seed, step) alone: a stream from step k on equals the rest of one from step 0,
    and all processes together give the same samples in the same order, whatever their number. When a worker dies (of the system's
    out-of-memory killer, say), new ones go on from the step that is lost, up to MAX_RESTARTS times without a batch in between.

    Args:
        seed: of the order; crops and views have the seed of the data set.
        batch_size: of all processes together.
        num_workers: processes that decode; 0 decodes here.
        pin_memory: in page-locked memory, from which a copy to a CUDA device does not hold up the process.
    """
    return BatchStream(
        dataset,
        seed=seed,
        start_step=start_step,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        end_step=end_step,
        pin_memory=pin_memory,
    )


class OrderedBatch(TypedDict):
    """Images in the order of their indices, unreadable ones left out."""

    images: np.ndarray
    """uint8 [B, H, W, 3]; or [B, V, H, W, 3] where views were asked for."""
    labels: np.ndarray
    """int64 [B]"""
    indices: np.ndarray
    """int64 [B]"""


class OrderedBatches:
    """Every image of some chunks of indices once, one batch a chunk (an empty one if nothing in it can be read)."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        chunks: list[np.ndarray],
        *,
        views: ViewConfig | None = None,
        num_workers: int = 0,
        on_bad_image: OnBadImage = "stop",
    ) -> None:
        self.fetch = _FetchChunk(source, image_size, views, on_bad_image)
        self.chunks, self.num_workers = chunks, num_workers
        self.bad_images: BadImages = {}

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[OrderedBatch]:
        for images, labels, indices, bad in map_in_order(self.fetch, self.chunks, self.num_workers):
            self.bad_images |= bad
            yield {"images": images.numpy(), "labels": labels.numpy(), "indices": indices.numpy()}


def ordered_batches(
    source: ImageSource,
    image_size: int,
    *,
    batch_size: int,
    views: ViewConfig | None = None,
    indices: np.ndarray | None = None,
    num_workers: int = 0,
    on_bad_image: OnBadImage = "stop",
) -> OrderedBatches:
    """Every image once, in the order of `indices` (all of the source if None), to encode or to measure.

    Args:
        views: crops and flips of every image; None gives ADM's centre crop without an axis of views.
        on_bad_image: `skip` leaves an unreadable image out and notes it in `bad_images` of the result.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices)
    chunks = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    return OrderedBatches(source, image_size, chunks, views=views, num_workers=num_workers, on_bad_image=on_bad_image)


def bad_images_summary(bad_images: Mapping[int, str]) -> str:
    """What to print at the end of a job that skipped images: a heading and one line an image; nothing if there are none."""
    if not bad_images:
        return ""
    heading = f"{len(bad_images)} unreadable image{'s were' if len(bad_images) > 1 else ' was'} skipped:"
    return "\n".join([heading, *(f"  {bad_images[index]}" for index in sorted(bad_images))])


class _FetchStep:
    """step -> (batch, images newly found unreadable); runs in a worker."""

    def __init__(self, dataset: TrainingData, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __call__(self, step: int) -> tuple[Batch, BadImages]:
        positions = sample_positions(step, self.batch_size, self.rank, self.world_size)
        batch = self.dataset.get_batch(positions, self.dataset.order.indices(self.seed, positions))
        bad = dict(self.dataset.bad_images)
        self.dataset.bad_images.clear()
        return batch, bad


class _FetchChunk:
    """indices -> (images, labels, indices, unreadable images); runs in a worker."""

    def __init__(self, source: ImageSource, image_size: int, views: ViewConfig | None, on_bad_image: OnBadImage) -> None:
        self.source, self.image_size, self.on_bad_image = source, image_size, on_bad_image
        self.views = views

    def __call__(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor, BadImages]:
        views = self.views or ViewConfig()
        shape = (views.num_views, self.image_size, self.image_size, 3)
        images = np.empty((len(indices), *shape), dtype=np.uint8)
        kept: list[int] = []
        bad: BadImages = {}
        for index in indices.tolist():
            try:
                image = self.source.load(index)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise
                bad[index] = f"{error.name}: {error.reason}"
                continue
            images[len(kept)] = np.stack([np.asarray(view) for view in views.apply(image, self.image_size)])
            kept.append(index)
        images = images[: len(kept)] if self.views is not None else images[: len(kept), 0]
        read = np.array(kept, dtype=np.int64)
        return torch.from_numpy(images), torch.from_numpy(self.source.labels[read]), torch.from_numpy(read), bad
