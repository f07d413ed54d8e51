"""The nearest rows of a stream for each of some queries, in bounded memory: only the n nearest so far are kept.

Shapes: Q queries, n neighbours, B rows of a batch, D values of a row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS = 1024
"""Pairs of rows whose exact distance is computed at once."""
SLACK = 1e-5
"""Relative error that the expansion of squares may have in float32."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """The neighbours of the queries in one space, nearest first."""

    distances: np.ndarray
    """float64 [Q, n]"""
    indices: np.ndarray
    """int64 [Q, n], places in the training set."""


class RunningNearest:
    """The n nearest rows of a stream for each query.

    Args:
        queries: float32 [Q, D].
        num: n.
        metric: `cosine` gives 1 - cosine, `l2` the Euclidean distance, `rms` the root mean square difference.
    """

    def __init__(self, queries: Tensor, num: int, metric: Literal["cosine", "l2", "rms"]) -> None:
        self.metric, self.num = metric, num
        self.queries = F.normalize(queries, dim=1) if metric == "cosine" else queries
        self.lengths = self.queries.square().sum(1, keepdim=True)
        self.squares = torch.full((len(queries), num), torch.inf, dtype=torch.float64, device=queries.device)
        self.indices = torch.full((len(queries), num), -1, dtype=torch.int64, device=queries.device)

    def update(self, rows: Tensor, indices: np.ndarray) -> None:
        """Consider rows float32 [B, D] with their places in the set, int64 [B]."""
        rows = F.normalize(rows, dim=1) if self.metric == "cosine" else rows
        # the expansion is quick and loses digits where rows are near: it only chooses, and those distances are then computed exactly
        lengths = rows.square().sum(1)
        rough = self.lengths - 2 * self.queries @ rows.T + lengths  # [Q, B]
        near = rough.topk(min(self.num, len(rows)), dim=1, largest=False)
        can_enter = near.values <= self.squares[:, -1:] + SLACK * (self.lengths + lengths.max())
        query, column = can_enter.nonzero(as_tuple=True)
        exact = torch.full(near.values.shape, torch.inf, dtype=torch.float64, device=rows.device)
        for part, places in zip(query.split(PAIRS), near.indices[query, column].split(PAIRS), strict=True):
            exact_part = (self.queries[part].double() - rows[places].double()).square().sum(1)
            exact[part, column[: len(part)]] = exact_part
            column = column[len(part) :]
        places = torch.from_numpy(indices).to(rows.device)[near.indices]
        squares, places = torch.cat([self.squares, exact], dim=1), torch.cat([self.indices, places], dim=1)
        # of equal distances the earlier image comes first, so a copy of a copy changes nothing
        order = squares.sort(dim=1, stable=True).indices[:, : self.num]
        self.squares, self.indices = squares.gather(1, order), places.gather(1, order)

    def finish(self) -> Neighbourhood:
        """What was found so far."""
        squares = self.squares.cpu().numpy()
        if self.metric == "cosine":
            distances = squares / 2  # |a - b|^2 = 2 - 2 cos for unit vectors
        else:
            distances = np.sqrt(squares / (self.queries.shape[1] if self.metric == "rms" else 1))
        return Neighbourhood(distances=distances, indices=self.indices.cpu().numpy())
