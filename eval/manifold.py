"""Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991): is an image inside the manifold of the other set?

The manifold of a set is the union of balls around its points that reach to the point's k-th neighbour. Two arithmetics: `adm` follows ADM's
evaluator, which computes |u|^2 - 2 u.v + |v|^2 in float16 and falls back to float32 for a whole block of pairs when anything in it
overflows; `float32` computes distances as one would expect, as torch-fidelity does. They differ by about half a point.

Shapes: N generated, M reference images, D features; u and v are tiles of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.eval.features import exact_float32

Mode = Literal["adm", "float32"]
ADM_BLOCK = 10_000
"""Rows and columns of a block of pairs that falls back to float32 as one."""
SAFE = 60_000.0
"""Below this no sum of float16 numbers, rounded or not, reaches their limit of 65,504."""
TILE = 2_500
"""Rows and columns that are held at once; divides ADM_BLOCK."""


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """Precision and recall of N generated against M reference images."""

    precision: float
    """Part of the generated images inside the reference's manifold."""
    recall: float
    """Part of the reference images inside that of the generated ones."""
    generated_inside: np.ndarray = field(repr=False)
    """bool [N]"""
    reference_inside: np.ndarray = field(repr=False)
    """bool [M]"""


@exact_float32()
def precision_recall(
    generated: np.ndarray, reference: np.ndarray, *, k: int = 3, mode: Mode = "float32", device: str | torch.device = "cpu"
) -> Manifold:
    """Memory stays below a few tiles of TILE x TILE pairs, however many images there are.

    Args:
        generated: float32 [N, D], an array or a memory map; `reference` [M, D].
        k: neighbour that sets the radius.

    Raises:
        UserError: no more than k images on a side, or another number of features.
    """
    for name, rows in (("generated", generated), ("reference", reference)):
        if len(rows) <= k:
            raise UserError(f"precision and recall with k = {k} need at least {k + 1} {name} images, got {len(rows)}; give more images")
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"features of {generated.shape[1]} and {reference.shape[1]} numbers cannot be compared; use one extractor for both sets"
        )
    pairs = _Distances(mode, torch.device(device))
    generated_inside = _inside(generated, reference, manifold_radii(reference, k=k, mode=mode, device=device), pairs)
    reference_inside = _inside(reference, generated, manifold_radii(generated, k=k, mode=mode, device=device), pairs)
    return Manifold(
        precision=float(generated_inside.mean()),
        recall=float(reference_inside.mean()),
        generated_inside=generated_inside,
        reference_inside=reference_inside,
    )


@exact_float32()
def manifold_radii(features: np.ndarray, *, k: int = 3, mode: Mode = "float32", device: str | torch.device = "cpu") -> np.ndarray:
    """Squared distance of each point to its k-th neighbour, float32 [N]; the point itself is the 0-th, whatever its rounded distance."""
    pairs = _Distances(mode, torch.device(device))
    radii = np.empty(len(features), dtype=np.float32)
    for rows in _ranges(len(features), TILE):
        nearest: Tensor | None = None
        for distances, _ in pairs.of_rows(features, rows, features):
            candidates = distances if nearest is None else torch.cat([nearest, distances], dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), dim=1, largest=False).values
        assert nearest is not None
        radii[rows.start : rows.stop] = nearest.max(dim=1).values.cpu().numpy()
    return radii


@exact_float32()
def squared_distances(a: np.ndarray, b: np.ndarray, mode: Mode = "float32", device: str | torch.device = "cpu") -> np.ndarray:
    """All pairs of two small sets [N, D] and [M, D]: float32 [N, M]."""
    pairs = _Distances(mode, torch.device(device))
    tiles = [distances.cpu().numpy() for distances, _ in pairs.of_rows(a, range(len(a)), b)]
    return np.concatenate(tiles, axis=1)


class _Distances:
    """Squared distances of some rows to all columns, tile by tile."""

    def __init__(self, mode: Mode, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.overflows: dict[tuple[int, int, int, int], bool] = {}
        self.norms: dict[tuple[int, int], float] = {}

    def of_rows(self, a: np.ndarray, rows: range, b: np.ndarray) -> Iterator[tuple[Tensor, range]]:
        """float32 tiles [len(rows), T] with their columns."""
        u = self._load(a, rows)
        for columns in _ranges(len(b), TILE):
            v = self._load(b, columns)
            if self.mode == "float32" or self._overflows(a, rows, b, columns):
                yield _expanded(u, v), columns
            else:
                yield _expanded_float16(u, v), columns

    def _overflows(self, a: np.ndarray, rows: range, b: np.ndarray, columns: range) -> bool:
        """Whether ADM's whole block around this tile has a non-finite value in float16; known block by block."""
        key = (id(a), rows.start // ADM_BLOCK, id(b), columns.start // ADM_BLOCK)
        if key not in self.overflows:
            largest = self._largest_norm(a, key[1]) + self._largest_norm(b, key[3])
            self.overflows[key] = largest**2 > SAFE and any(
                not bool(torch.isfinite(_expanded_float16(self._load(a, i), self._load(b, j))).all())
                for i in _ranges(len(a), TILE, key[1] * ADM_BLOCK, (key[1] + 1) * ADM_BLOCK)
                for j in _ranges(len(b), TILE, key[3] * ADM_BLOCK, (key[3] + 1) * ADM_BLOCK)
            )
        return self.overflows[key]

    def _largest_norm(self, features: np.ndarray, block: int) -> float:
        """Of the rows of one block; bounds every intermediate result by (|u| + |v|)^2, so that most blocks need no closer look."""
        key = (id(features), block)
        if key not in self.norms:
            ranges = _ranges(len(features), TILE, block * ADM_BLOCK, (block + 1) * ADM_BLOCK)
            self.norms[key] = max(float(self._load(features, rows).norm(dim=1).max()) for rows in ranges)
        return self.norms[key]

    def _load(self, features: np.ndarray, rows: range) -> Tensor:
        return torch.from_numpy(np.array(features[rows.start : rows.stop], dtype=np.float32)).to(self.device)


def _inside(points: np.ndarray, manifold: np.ndarray, radii: np.ndarray, pairs: _Distances) -> np.ndarray:
    """Which points lie in a ball of the manifold, bool [N]."""
    inside = np.zeros(len(points), dtype=bool)
    limits = torch.from_numpy(radii).to(pairs.device)
    for rows in _ranges(len(points), TILE):
        found = torch.zeros(len(rows), dtype=torch.bool, device=pairs.device)
        for distances, columns in pairs.of_rows(points, rows, manifold):
            found |= (distances <= limits[columns.start : columns.stop]).any(dim=1)
        inside[rows.start : rows.stop] = found.cpu().numpy()
    return inside


def _expanded(u: Tensor, v: Tensor) -> Tensor:
    """|u|^2 - 2 u.v + |v|^2, clipped at 0: float32 [U, V]."""
    return torch.addmm((u * u).sum(1, keepdim=True) + (v * v).sum(1), u, v.T, alpha=-2).clamp_(min=0)


def _expanded_float16(u: Tensor, v: Tensor) -> Tensor:
    """The same as ADM's evaluator does it: inputs, norms, products and sums rounded to float16, sums of products taken in float32."""
    u16, v16 = u.half(), v.half()
    norm_u = (u16 * u16).float().sum(1, keepdim=True).half()
    norm_v = (v16 * v16).float().sum(1).half()
    products = (u16.float() @ v16.float().T).half()
    distances = norm_u - 2 * products + norm_v
    return distances.clamp_(min=0).float()


def _ranges(num: int, step: int, start: int = 0, stop: int | None = None) -> list[range]:
    end = num if stop is None else min(stop, num)
    return [range(i, min(i + step, end)) for i in range(start, end, step)]
