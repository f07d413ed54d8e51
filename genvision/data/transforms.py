"""Crops and flips, PIL in and PIL out: ADM's centre crop, LlamaGen's random crop and ten crops, and MAGE's resized crop.

All but the last resize as ADM does (github.com/openai/guided-diffusion, image_datasets.py): halve with a box filter while the
shorter side is at least twice the target, then bicubic to the exact shorter side. A resized crop is resized at once.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from genvision.data.token_augment import random_box
from genvision.errors import UserError

Crop = Literal["center", "random", "resized"]
"""ADM's centre crop; a random crop after a random enlargement; a random part of other size and proportions, resized."""
MIN_AREA = 0.2
"""Least part of the image's area in a resized crop: MAGE's."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How an image becomes a training image."""

    crop: Crop = "center"
    """See Crop."""
    flip: bool = True
    """Mirror half of the images."""
    enlarge_range: tuple[float, float] = (1.0, 1.25)
    """Of a random crop: the shorter side before it is between these multiples of the image size."""
    min_area: float = MIN_AREA
    """Of a resized crop: the least part of the image's area in it."""

    def __post_init__(self) -> None:
        _check_choice("crop", self.crop, get_args(Crop))
        low, high = self.enlarge_range
        if not 1 <= low <= high:
            raise UserError(f"enlarge_range must be two rising numbers of at least 1, got {self.enlarge_range}")
        if not 0 < self.min_area <= 1:
            raise UserError(f"min_area must be above 0 and at most 1, got {self.min_area}")

    def apply(self, image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """The crop of side `size`, not mirrored."""
        if self.crop == "resized":
            return resized_crop(image, size, rng, min_area=self.min_area)
        if self.crop == "random":
            return random_crop(image, size, rng, enlarge_range=self.enlarge_range)
        return center_crop(image, size)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Which fixed views of an image are taken, to encode or to measure it."""

    crops: Literal["center", "ten"] = "center"
    """ADM's centre crop; or four corners and the centre of a slightly larger one, and the flips of these five."""
    flip: bool = False
    """Take the flip of the centre crop too; ten crops always hold their flips."""
    enlarge: float = 1.1
    """Of ten crops: the larger centre crop has int(enlarge * size) pixels a side."""

    def __post_init__(self) -> None:
        _check_choice("crops", self.crops, ("center", "ten"))
        if self.crops == "ten" and not self.flip:
            raise UserError("ten crops always hold flips, got flip false; set flip to true, or take the centre crop alone (crops: center)")
        if self.enlarge < 1:
            raise UserError(f"enlarge must be at least 1, got {self.enlarge}")

    @property
    def num_views(self) -> int:
        return 10 if self.crops == "ten" else 1 + self.flip

    def apply(self, image: Image.Image, size: int) -> list[Image.Image]:
        """All views of side `size`, always in the same order."""
        if self.crops == "ten":
            return ten_crop(image, size, self.enlarge)
        center = center_crop(image, size)
        return [center, flip(center)] if self.flip else [center]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to `size` x `size`."""
    image = resize_shorter_side(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, enlarge_range: tuple[float, float] = (1.0, 1.25)
) -> Image.Image:
    """A random `size` x `size` part, after the shorter side is resized to a random whole number.

    Args:
        enlarge_range: the shorter side is uniform between these multiples of `size`, rounded up, both included (256 to 320 for 256).
    """
    low, high = (math.ceil(size * ratio) for ratio in enlarge_range)
    image = resize_shorter_side(image, int(rng.integers(low, high + 1)))
    top = int(rng.integers(image.height - size + 1))
    left = int(rng.integers(image.width - size + 1))
    return _crop(image, left, top, size)


def resized_crop(image: Image.Image, size: int, rng: np.random.Generator, *, min_area: float = MIN_AREA) -> Image.Image:
    """A random part, resized to `size` x `size`, so that its proportions change (arXiv:1409.4842, section 6; torchvision's draws).

    Args:
        min_area: the part's area is uniform between this and 1 times the image's; its width over its height lies in 3/4 .. 4/3.
            Where ten draws do not fit into the image, it is the largest such part in the middle.
    """
    top, left, height, width = random_box((image.height, image.width), rng, scale=(min_area, 1.0))
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def ten_crop(image: Image.Image, size: int, enlarge: float = 1.1) -> list[Image.Image]:
    """Four corners and the centre of a centre crop to int(size * enlarge), then their flips (torchvision's TenCrop order)."""
    large = int(size * enlarge)
    image = center_crop(image, large)
    far, middle = large - size, round((large - size) / 2)
    corners = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]  # (left, top)
    five = [_crop(image, left, top, size) for left, top in corners]
    # TenCrop crops the mirrored image again, so its sixth view is the mirror of the second, not of the first
    mirrored = flip(image)
    return five + [_crop(mirrored, left, top, size) for left, top in corners]


def flip(image: Image.Image) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize: box-filter halvings while the shorter side is at least 2 * `size`, then bicubic to `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} '{value}' is unknown; choose one of {', '.join(choices)}")
