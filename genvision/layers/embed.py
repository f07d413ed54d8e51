"""Embeddings of conditions. Dropping a condition is what makes classifier-free guidance possible (arXiv:2207.12598)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """Class labels [B] -> [B, 1, C]; one more row for the null class where labels are dropped in training."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.table = nn.Embedding(num_classes + int(dropout > 0), dim)

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop` [B] boolean says whose label is dropped; None draws it in training and drops none in eval."""
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.table(labels).unsqueeze(1)


class TextEmbedding(nn.Module):
    """Text features [B, T, F] -> [B, T, C] by a two-layer perceptron; a fixed random table stands for "no text".

    The null features are a buffer: the official training saves but never changes them.
    """

    def __init__(self, length: int, feature_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(feature_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.null_features: Tensor
        self.register_buffer("null_features", torch.randn(length, feature_dim) / feature_dim**0.5)

    def forward(self, features: Tensor, drop: Tensor | None = None) -> Tensor:
        if drop is None and self.training and self.dropout > 0:
            drop = torch.rand(features.shape[0], device=features.device) < self.dropout
        if drop is not None:
            features = torch.where(drop[:, None, None], self.null_features, features)
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, C]: 256 sinusoids, cosines first, through a perceptron of two layers (DiT, arXiv:2212.09748, section 3.2).

    Args:
        dim: C.
        freq_shift: the frequencies are 10000^(-k / (128 - freq_shift)); 0 in the original code, 1 in diffusers.
        time_scale: times are multiplied by it first.
    """

    NUM_FEATURES = 256

    def __init__(self, dim: int, freq_shift: int = 0, time_scale: float = 1.0) -> None:
        super().__init__()
        self.freq_shift, self.time_scale = freq_shift, time_scale
        self.fc1 = nn.Linear(self.NUM_FEATURES, dim)
        self.fc2 = nn.Linear(dim, dim)

    def features(self, t: Tensor) -> Tensor:
        """float32 [B, 256]."""
        count = self.NUM_FEATURES // 2
        exponents = -math.log(10000) * torch.arange(count, dtype=torch.float32, device=t.device) / (count - self.freq_shift)
        angles = (t.float() * self.time_scale).unsqueeze(1) * exponents.exp()
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(self.features(t).to(self.fc1.weight.dtype))))


def sincos_table(positions: Tensor, dim: int, *, base: float = 10000.0, reaches_base: bool = True) -> Tensor:
    """Sine and cosine features of positions along one or more axes, in the order [sin, cos] of the first axis, of the second, ...

    The n = dim / (2 A) frequencies of an axis are base^(-k / (n - 1)), as in MoCo v3 and big_vision; MAE and DiT divide by n.

    Args:
        positions: [N, A], a column for each axis.
        dim: features; a multiple of 2 A, at least 4 A.
        reaches_base: the lowest frequency is 1 / base, that is, divide by n - 1.

    Returns:
        float32 [N, dim].
    """
    count = dim // (2 * positions.shape[1])
    last = count - 1 if reaches_base else count
    frequencies = base ** (-torch.arange(count, dtype=torch.float64, device=positions.device) / last)
    angles = positions.double().unsqueeze(-1) * frequencies  # [N, A, n]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def grid_positions(grid: tuple[int, int, int], axes: int, device: torch.device | None = None) -> Tensor:
    """Positions of the cells of a grid t x h x w in raster order, int64 [t*h*w, axes]: the index, (x, y) or (t, x, y)."""
    if axes == 1:
        return torch.arange(math.prod(grid), device=device).unsqueeze(1)
    t, y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    return torch.stack([t, x, y][3 - axes :], dim=-1).flatten(0, 2)


def resize_position_table(table: Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]) -> Tensor:
    """A table [1, t*h*w, D] for other h x w, by bicubic interpolation of every frame; t stays."""
    t, h, w = grid
    planes = rearrange(table, "1 (t h w) d -> t d h w", t=t, h=h, w=w)
    return rearrange(F.interpolate(planes, new_grid[1:], mode="bicubic"), "t d h w -> 1 (t h w) d")
