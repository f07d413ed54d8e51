"""Rotary positions (RoFormer, arXiv:2104.09864) over a grid, in LlamaGen's layout."""

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
