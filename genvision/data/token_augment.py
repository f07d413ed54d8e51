"""Augmentation of images that are stored as tokens (SeiT, arXiv:2303.11114, section 3; SeiT++, arXiv:2312.10105, for ColorAdapt).

Every random number belongs to an image: give `rngs`, one numpy generator an image, from `genvision.data.order.sample_rng(seed, position)`.
Mirroring is not among them, since a code is not the code of its mirror image: encode the flips instead.

Shapes: B images, tokens [B, h, w] int64, K codes, codebook [K, D], embeddings [B, D, h, w].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError

Box = tuple[int, int, int, int]
"""Top, left, height and width in tokens."""
Rngs = Sequence[np.random.Generator]
BOX_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class TokenAugmentConfig:
    """How tokens are augmented; the defaults are SeiT's."""

    size: int = 28
    """Side of the embeddings after the random crop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Part of the area that a crop takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop."""
    synonym_probability: float = 0.25
    """Of an image to have tokens replaced by similar codes."""
    synonym_share: float = 0.25
    """Part of its tokens that are."""
    num_synonyms: int = 5
    """Nearest codes to choose from."""
    swap_probability: float = 0.25
    """Of an image to have two squares swapped, up to a quarter of its side."""
    noise_probability: float = 0.25
    """Of an image to get Emb-Noise. (The authors draw it for half of the batches, and then for half of their images.)"""
    color_probability: float = 0.125
    """Of an image to get ColorAdapt instead. (The authors: a quarter of the batches, half of their images.)"""

    def __post_init__(self) -> None:
        for name in ("synonym_probability", "synonym_share", "swap_probability", "noise_probability", "color_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in 0 .. 1, got {getattr(self, name)}")
        if self.noise_probability + self.color_probability > 1:
            raise UserError(
                f"noise_probability {self.noise_probability} and color_probability {self.color_probability} exclude each other, "
                "their sum must be at most 1"
            )
        if self.size < 1 or self.num_synonyms < 1:
            raise UserError(f"size and num_synonyms must be at least 1, got {self.size} and {self.num_synonyms}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"scale must be two rising numbers in 0 .. 1 and ratio two rising ones above 0, got {self.scale}, {self.ratio}")


class TokenAugmentation:
    """Tokens in, augmented embeddings out: TokenEDA, then Token-RRC, then Emb-Noise or ColorAdapt.

    Args:
        codebook: [K, D], embeddings of the codes.

    Raises:
        UserError: there are fewer other codes than synonyms.
    """

    def __init__(self, codebook: Tensor, config: TokenAugmentConfig | None = None) -> None:
        self.codebook, self.config = codebook, config or TokenAugmentConfig()
        self.synonyms = nearest_codes(codebook, self.config.num_synonyms)

    def __call__(self, tokens: Tensor, rngs: Rngs) -> Tensor:
        """[B, h, w] -> [B, D, size, size]; each image by its own generator, and ColorAdapt by the rest of the batch too."""
        config = self.config
        side = tokens.shape[1:]
        replaced, boxes = [], []
        for grid, rng in zip(tokens, rngs, strict=True):
            if rng.random() < config.synonym_probability:
                grid = replace_by_synonyms(grid, self.synonyms, config.synonym_share, rng)
            if rng.random() < config.swap_probability:
                grid = swap_squares(grid, rng)
            replaced.append(grid)
            boxes.append(random_box((side[0], side[1]), rng, scale=config.scale, ratio=config.ratio))
        x = crop_and_resize(torch.stack(replaced), self.codebook, boxes, config.size)
        chances = [rng.random() for rng in rngs]
        num = len(rngs)
        partners = [(i + 1 + int(rng.random() * (num - 1))) % num for i, rng in enumerate(rngs)]  # itself where it is alone
        adapted = color_adapt(x, torch.tensor(partners, device=x.device))
        out = x.clone()
        for i, (chance, rng) in enumerate(zip(chances, rngs, strict=True)):
            if chance < config.noise_probability:
                out[i] = add_noise(x[i], rng)
            elif chance < config.noise_probability + config.color_probability:
                out[i] = adapted[i]
        return out


def embed(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Tokens [B, h, w] and codebook [K, D] -> embeddings [B, D, h, w].

    Raises:
        UserError: a token lies outside the codebook.
    """
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(codebook):
        raise UserError(f"tokens lie in {int(tokens.min())} .. {int(tokens.max())}, but the codebook given has {len(codebook)} codes")
    return codebook[tokens].permute(0, 3, 1, 2)


def crop_and_resize(tokens: Tensor, codebook: Tensor, boxes: Sequence[Box], size: int) -> Tensor:
    """Token-RRC: a box of each image, as embeddings, resized bicubically: [B, h, w] -> [B, D, size, size].

    The authors resize one-hot planes [K, h, w] and multiply them by the codebook. Both maps are linear, one over places, the other over
    channels, so embeddings can be resized instead: D planes for K.
    """
    x = embed(tokens, codebook)
    crops = [image[None, :, i : i + h, j : j + w] for image, (i, j, h, w) in zip(x, boxes, strict=True)]
    return torch.cat([F.interpolate(crop, (size, size), mode="bicubic", align_corners=False) for crop in crops])


def center_crop_tokens(tokens: Tensor, size: int) -> Tensor:
    """The middle [B, size, size] of [B, h, w], for evaluation (28 of 32).

    Raises:
        UserError: the grid is smaller.
    """
    height, width = tokens.shape[1:]
    if size > min(height, width):
        raise UserError(f"a centre crop of {size} tokens does not fit a grid of {height} x {width}; choose at most {min(height, width)}")
    top, left = (height - size) // 2, (width - size) // 2
    return tokens[:, top : top + size, left : left + size]


def random_box(
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """The box of a random resized crop of a grid (h, w), drawn as torchvision does: uniform area, log-uniform ratio; else the middle."""
    height, width = grid
    for _ in range(BOX_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = max(1, min(height, round(width / ratio[0]))), max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def nearest_codes(codebook: Tensor, num: int = 5) -> Tensor:
    """Of every code the `num` nearest others, nearest first: [K, D] -> [K, num] int64 (Euclidean).

    Raises:
        UserError: there are not so many.
    """
    if not 1 <= num < len(codebook):
        raise UserError(f"num_synonyms {num}: the codebook has {len(codebook)} codes, each {len(codebook) - 1} others")
    near = []
    for first in range(0, len(codebook), 1024):  # a part of the K x K distances at a time
        part = torch.cdist(codebook[first : first + 1024], codebook)
        part[torch.arange(len(part)), first + torch.arange(len(part))] = torch.inf
        near.append(part.topk(num, largest=False).indices)
    return torch.cat(near)


def replace_by_synonyms(grid: Tensor, synonyms: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """TokenEDA: a part `share` of an image's tokens [h, w] replaced, each by one of its `synonyms` [K, num] at random."""
    flat = grid.flatten().clone()
    places = torch.from_numpy(rng.permutation(len(flat))[: round(share * len(flat))]).to(grid.device)
    choices = torch.from_numpy(rng.integers(synonyms.shape[1], size=len(places))).to(grid.device)
    flat[places] = synonyms[flat[places], choices]
    return flat.view_as(grid)


def swap_squares(grid: Tensor, rng: np.random.Generator) -> Tensor:
    """TokenEDA: two squares of an image [h, w] that do not overlap change places; their side is at most a quarter of the shorter one."""
    height, width = grid.shape
    if height * width < 2:
        raise UserError(f"a grid of {height} x {width} tokens has no two squares to swap; set swap_probability to 0")
    side = int(rng.integers(1, max(1, min(height, width) // 4) + 1))
    while True:  # at most about every third pair overlaps
        (i, k), (j, m) = rng.integers(height - side + 1, size=2).tolist(), rng.integers(width - side + 1, size=2).tolist()
        if abs(i - k) >= side or abs(j - m) >= side:
            break
    out = grid.clone()
    out[i : i + side, j : j + side] = grid[k : k + side, m : m + side]
    out[k : k + side, m : m + side] = grid[i : i + side, j : j + side]
    return out


def add_noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Emb-Noise: standard normal numbers, one a channel and one an element, added to embeddings [D, h, w]."""
    by_channel, by_element = rng.standard_normal((x.shape[0], 1, 1)), rng.standard_normal(tuple(x.shape))
    return x + torch.from_numpy(by_channel + by_element).to(x)


def color_adapt(x: Tensor, partners: Tensor) -> Tensor:
    """ColorAdapt: embeddings [B, D, h, w] take each channel's mean and (unbiased) deviation from image `partners[b]` of the batch."""
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)  # each [B, D, 1, 1]
    std = std.clamp_min(1e-6)  # a channel that is the same everywhere has none
    return (x - mean) / std * std[partners] + mean[partners]
