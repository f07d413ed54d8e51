"""Orders in which a masked sampler reveals the tokens of a grid (Halton-MaskGIT, arXiv:2503.17076, section 3.2)."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def halton_order(side: int) -> Tensor:
    """Cells of a side x side grid along the two-dimensional Halton sequence: row by base 2, column by base 3, from its first point on.

    Neighbours in time lie far apart in the image, so that tokens which are drawn together depend little on one another.

    Returns:
        int64 [side * side], numbers of the cells in raster order.
    """
    num_points = 4 * side * side
    while True:
        points = torch.arange(1, num_points + 1)
        cells = _cell(points, 2, side) * side + _cell(points, 3, side)
        first = dict.fromkeys(cells.tolist())  # without those that were met before
        if len(first) == side * side:
            return torch.tensor(list(first))
        num_points *= 2


def _cell(index: Tensor, base: int, side: int) -> Tensor:
    """floor(side * x) of the radical inverse x of each index, in whole numbers: the digits behind the point, mirrored."""
    mirrored, denominator = torch.zeros_like(index), torch.ones_like(index)
    while bool((index > 0).any()):
        more = index > 0
        mirrored = torch.where(more, mirrored * base + index % base, mirrored)
        denominator = torch.where(more, denominator * base, denominator)
        index = index // base
    return mirrored * side // denominator
