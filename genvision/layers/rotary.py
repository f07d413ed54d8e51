"""Rotary positions (RoFormer, arXiv:2104.09864) over a grid, in LlamaGen's layout."""

import math

import torch
from torch import Tensor


def rotary_table_2d(grid_size: int, head_dim: int, *, base: float = 10000.0, prefix_length: int = 0) -> Tensor:
    """Cosines and sines for a raster of grid cells behind a prefix.

    The first half of a head's channels turns with the row, the second half with the column. Prefix rows hold cos = 0 and
    sin = 0, so that queries and keys there become zero vectors; every official LlamaGen checkpoint relies on that.

    Returns:
        float32 [prefix_length + grid_size^2, head_dim / 2, 2], (cos, sin) last.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)  # [half / 2]
    angles = torch.outer(torch.arange(grid_size).float(), frequencies)  # [grid, half / 2]
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [grid^2, half]
    table = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([torch.zeros(prefix_length, *table.shape[1:]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn interleaved channel pairs (2j, 2j + 1) of x [B, H, N, D] by the angles of table [N, D / 2, 2], in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each [B, H, N, D / 2]
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


def rotate_rows(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` for x [B, N, H, D], as projections make it: one complex product.

    On a CPU this takes a tenth of the time of `rotate` on the transposed queries and keys, forward and backward.

    Args:
        table: [N, D / 2, 2], or [H, N, D / 2, 2] where heads turn differently.
    """
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic, and has no code for complex numbers
        return rotate(x.transpose(1, 2), table).transpose(1, 2)
    turns = torch.view_as_complex(table)
    turns = turns.unsqueeze(1) if table.dim() == 3 else turns.transpose(0, 1)  # [N, 1 or H, D / 2]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, N, H, D / 2]
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def rotary_table(positions: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Cosines and sines for positions along one axis or more; axis a turns the a-th part of a head's pairs.

    The D / (2 A) frequencies of an axis are base^(-2 A i / D). In one dimension this is RoFormer's table.

    Args:
        positions: float32 [N, A], a column for each axis.
        head_dim: D, a multiple of 2 A.

    Returns:
        float32 [N, D / 2, 2], (cos, sin) last.
    """
    step = 2 * positions.shape[1]
    frequencies = base ** (-torch.arange(0, head_dim, step, device=positions.device).float() / head_dim)  # [D / (2 A)]
    angles = (positions.unsqueeze(-1) * frequencies).flatten(1)  # a product, not a matmul, which autocast would make bfloat16
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def mixed_rotary_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines of x * f_x + y * f_y with learned frequencies (RoPE-Mixed, arXiv:2403.13298, section 3.2).

    Args:
        positions: float32 [N, 2], columns x and y.
        frequencies: [2, ..., D / 2], of x and of y; `...` are layers or heads.

    Returns:
        float32 [..., N, D / 2, 2], (cos, sin) last.
    """
    along_x, along_y = frequencies.float().unsqueeze(-2)  # each [..., 1, D / 2]
    angles = positions[:, :1] * along_x + positions[:, 1:] * along_y  # [..., N, D / 2]
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def mixed_rotary_frequencies(depth: int, num_heads: int, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Where learned frequencies start: two orthogonal directions for each magnitude, turned at random in every head.

    Returns:
        float32 [2, depth, num_heads * D / 2].
    """
    magnitudes = base ** (-torch.arange(0, head_dim, 4).float() / head_dim)  # [D / 4]
    directions = 2 * math.pi * torch.rand(depth, num_heads, 1)
    directions = torch.cat([directions.expand(-1, -1, len(magnitudes)), directions.expand(-1, -1, len(magnitudes)) + math.pi / 2], dim=-1)
    magnitudes = magnitudes.repeat(2)
    return torch.stack([magnitudes * directions.cos(), magnitudes * directions.sin()]).flatten(2)
