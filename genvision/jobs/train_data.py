"""The data of a training run: images as its configuration has them, and those that are held out."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from genvision.data.datasets import ImageDataset
from genvision.data.sources import open_source
from genvision.training.config import TrainConfig
from genvision.training.validation import ValidationBatches

ORDER_SAMPLE = 64
"""Places of an epoch by which an order is told."""
HeldOut = Callable[[int, int], Iterable[dict[str, Tensor]]]
"""rank and number of processes -> batches."""


def image_dataset(config: TrainConfig, image_size: int) -> ImageDataset:
    """The images of a run, cropped and flipped as its configuration says."""
    data = config.data
    return ImageDataset(
        open_source(data.spec),
        image_size,
        crop=data.crop,
        flip=data.flip,
        min_area=data.min_area,
        seed=config.seed,
        views=data.views,
        on_bad_image=data.on_bad_image,
        shuffle_window=data.shuffle_window,
    )


def data_hashes(config: TrainConfig, dataset: Any) -> dict[str, str]:
    """What tells the data of a run, and its order: a set behind a network is read in windows, a copy of it on a disk is not."""
    places = np.linspace(0, len(dataset) - 1, min(len(dataset), ORDER_SAMPLE)).astype(np.int64)
    order = dataset.order.indices(config.seed, places)
    return {"data": dataset.fingerprint(), "order": hashlib.sha256(np.ascontiguousarray(order, dtype=np.int64).tobytes()).hexdigest()}


def held_out_images(config: TrainConfig, image_size: int) -> ImageDataset | None:
    """Centre crops of the images for the validation loss (two views as in training, where views are compared); None if it is not wanted."""
    data = config.data
    if data.validation is None or not config.train.validate_every:
        return None
    is_plain = data.views == 1
    return ImageDataset(
        open_source(data.validation),
        image_size,
        crop="center" if is_plain else data.crop,
        flip=False if is_plain else data.flip,
        min_area=data.min_area,
        seed=config.seed,
        views=data.views,
        on_bad_image=data.on_bad_image,
    )


def held_out_batches(config: TrainConfig, dataset: Any, num_workers: int) -> HeldOut | None:
    """Batches of some samples of a data set, the same every time; None where there is none."""
    if dataset is None:
        return None
    loop = config.train
    batch_size = loop.batch_size // loop.accumulation

    def batches(rank: int, world_size: int) -> ValidationBatches:
        return ValidationBatches(
            dataset, num=loop.validate_num, batch_size=batch_size, rank=rank, world_size=world_size, num_workers=num_workers
        )

    return batches
