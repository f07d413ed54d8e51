"""Which images a probe reads, whose labels it is told, and which of them only choose. Every choice is drawn from the seed.

Shapes: N images.
"""

import numpy as np
import torch
from torch import Tensor

from genvision.data.order import epoch_order
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.probe_config import ProbeConfig

HELD_OUT = 0.1
"""Part of the training images that chooses weight decay, layer and probe."""


def choose_images(source: ImageSource, num: int | None, seed: int) -> np.ndarray:
    """Ascending indices of `num` images, of all if None."""
    if num is None:
        return np.arange(len(source))
    if not 1 <= num <= len(source):
        raise UserError(f"{source.spec}: {num:,} images are wanted, it holds {len(source):,}; choose 1 to {len(source):,}")
    return np.sort(epoch_order(seed, 0, len(source))[:num])


def choose_labels(source: ImageSource, available: np.ndarray, config: ProbeConfig) -> np.ndarray:
    """Those of `available`, ascending indices, whose labels are used: of each class the first in an order drawn from the seed."""
    if config.label_fraction is None and config.labels_per_class is None:
        return available
    labels = source.labels[available]
    shuffled = epoch_order(config.seed, 2, len(available))
    chosen = []
    for label, name in enumerate(source.label_names):
        mine = shuffled[labels[shuffled] == label]
        num = config.labels_per_class
        if num is None:
            num = max(1, round(config.label_fraction * len(mine))) if config.label_fraction is not None and len(mine) else 0
        if num > len(mine):
            raise UserError(
                f"{source.spec}: {num} labels of each class are wanted, class '{name}' has {len(mine):,} images; "
                "choose fewer, or give more images"
            )
        chosen.append(available[mine[:num]])
    return np.sort(np.concatenate(chosen))


def hold_out(num: int, config: ProbeConfig) -> Tensor:
    """Which training images only choose, bool [N]."""
    num_held_out = max(1, round(HELD_OUT * num))
    if "knn" in config.probes and num - num_held_out < config.k:
        raise UserError(
            f"{num:,} training images are too few for k = {config.k} neighbours; give more images or a smaller k, or leave out knn"
        )
    if num - num_held_out < 2:
        raise UserError(f"{num:,} training images are too few, one of which only chooses; give at least 3")
    mask = torch.zeros(num, dtype=torch.bool)
    mask[torch.from_numpy(epoch_order(config.seed, 1, num)[:num_held_out].copy())] = True
    return mask
