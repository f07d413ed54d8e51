"""What a classifier is fine-tuned on: random parts of images, and mixtures of two images with mixed labels.

Shapes: B images, K classes.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genvision.data.datasets import BadImages, Batch, ImageDataset
from genvision.data.order import sample_rng, uniform_choice
from genvision.data.sources import ImageSource
from genvision.images import from_uint8

Crop = Literal["center", "random", "resized"]
MIN_AREA = 0.2
MAX_ASPECT = 4 / 3
TRIES = 10


class ResizedCrops:
    """Random parts of images, resized: between a fifth and the whole of the area, aspects between 3:4 and 4:3 (arXiv:1409.4842, section 6).

    Args:
        flip: mirror half of them.
        seed: what becomes of an image depends on this and the position alone.
    """

    def __init__(self, source: ImageSource, image_size: int, *, flip: bool, seed: int) -> None:
        self.source, self.image_size, self.flip, self.seed = source, image_size, flip, seed
        self.labels, self.label_names = source.labels, source.label_names
        self.bad_images: BadImages = {}

    def __len__(self) -> int:
        return len(self.source)

    def get_batch(self, positions: np.ndarray, indices: np.ndarray) -> Batch:
        """See `genvision.data.datasets.ImageDataset.get_batch`."""
        positions = np.array(positions, dtype=np.int64)
        images = np.stack([self._part(index, position) for index, position in zip(indices.tolist(), positions.tolist(), strict=True)])
        if self.flip:
            mirrored = uniform_choice(self.seed, positions, 2) == 1
            images[mirrored] = images[mirrored, :, ::-1]
        return {"images": from_uint8(images), "labels": torch.from_numpy(self.labels[indices]), "positions": torch.from_numpy(positions)}

    def _part(self, index: int, position: int) -> np.ndarray:
        """uint8 [H, W, 3]"""
        image = self.source.load(index)
        box = random_box(image.width, image.height, sample_rng(self.seed, position))
        return np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box))


def open_training_images(source: ImageSource, image_size: int, *, crop: Crop, flip: bool, seed: int) -> ImageDataset | ResizedCrops:
    """Images for training; `center` and `random` are those of every other training in this package."""
    if crop == "resized":
        return ResizedCrops(source, image_size, flip=flip, seed=seed)
    return ImageDataset(source, image_size, crop=crop, flip=flip, seed=seed)


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part; the largest square in the middle where ten draws do not fit in."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(MIN_AREA, 1.0)
        aspect = math.exp(rng.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def mixer(mixup: float, cutmix: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [B, 3, H, W] and labels int64 [B] -> mixtures and shares of the classes, float [B, K].

    Every batch is mixed by mixup (arXiv:1710.09412) or by CutMix (arXiv:1905.04899), with equal chances where both are on. The draws are
    torch's own.

    Args:
        mixup, cutmix: both parameters of the Beta distribution of the shares; 0 turns one off.
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not kinds:
            return images, F.one_hot(labels, num_classes).float()
        chosen: Any = kinds[int(torch.randint(len(kinds), ()))]
        mixed, shares = chosen(images, labels)
        return mixed, shares.float()

    return mix
