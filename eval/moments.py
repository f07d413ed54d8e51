"""Moments of features and the Frechet distance between two Gaussians (FID, arXiv:1706.08500; sFID; FD-DINOv2).

Everything is float64. The trace of the root of S1 S2 is computed as the sum of the singular values of L1^T L2, where S = L L^T: unlike
the eigenvalues of the product it loses nothing when a covariance is singular, as it is with fewer images than features.

Shapes: N images, B images of a batch, D features, r rank of a covariance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.linalg.blas import dger
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from genvision.errors import UserError

CHUNK = 512
"""Rows of a matrix of pairs of eigenvalues that are held at once."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features."""

    mu: np.ndarray = field(repr=False)
    """float64 [D]"""
    sigma: np.ndarray = field(repr=False)
    """float64 [D, D]; the sample covariance, which divides by N - 1."""
    count: int | None = None
    """Images behind it; None if a file does not say."""

    def check(self) -> "Gaussian":
        """Itself, for statistics that come from outside.

        Raises:
            UserError: the shapes do not fit, a number is not finite, or the covariance is not symmetric.
        """
        dim = self.mu.shape[0] if self.mu.ndim == 1 else -1
        if self.sigma.shape != (dim, dim):
            raise UserError(f"statistics must be mu [D] and sigma [D, D], got {list(self.mu.shape)} and {list(self.sigma.shape)}")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise UserError("statistics hold numbers that are not finite; measure them again")
        scale = float(np.abs(self.sigma).max(initial=0))
        if float(np.abs(self.sigma - self.sigma.T).max(initial=0)) > 1e-6 * max(scale, 1e-300):
            raise UserError("the covariance of the statistics is not symmetric; measure them again")
        return self

    @cached_property
    def factor(self) -> np.ndarray:
        """L [D, r] with L L^T = sigma up to rounding, by Cholesky with pivots; r is the numerical rank."""
        upper, pivots, rank, info = dpstrf(self.sigma, lower=0)
        assert info >= 0, f"dpstrf: argument {-info} is wrong"
        factor = np.empty((len(self.mu), rank))
        factor[pivots - 1] = np.triu(upper[:rank]).T
        return factor

    @cached_property
    def bias(self) -> float:
        """`fid_bias` of the covariance; one reference meets many sets."""
        return fid_bias(self.sigma)


class Moments:
    """Count, mean and covariance of features that arrive in batches, all in float64.

    Deviations are taken from the running mean (Chan, Golub, LeVeque 1979), so order, batch size and sharding do not matter beyond 1e-12.
    """

    def __init__(self, feature_dim: int) -> None:
        self.count = 0
        self.mu = np.zeros(feature_dim)
        self.scatter = np.zeros((feature_dim, feature_dim))
        """Sum of the outer products of deviations from the mean."""

    def update(self, features: np.ndarray | Tensor) -> None:
        """Add features [B, D]."""
        batch = np.asarray(features, dtype=np.float64)
        assert batch.ndim == 2 and batch.shape[1] == len(self.mu), f"features must be [B, {len(self.mu)}], got {batch.shape}"
        if not np.isfinite(batch).all():
            raise UserError("the extractor gave features that are not finite; its weights are damaged, fetch them again")
        if len(batch) == 0:
            return
        mu = batch.mean(axis=0)
        deviations = batch - mu
        self._add(len(batch), mu, deviations.T @ deviations)

    def merge(self, other: "Moments") -> None:
        """Add everything that `other` has seen."""
        if other.count:
            self._add(other.count, other.mu, other.scatter)

    @property
    def sigma(self) -> np.ndarray:
        """Sample covariance [D, D] (divides by N - 1)."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}; give more images")
        covariance: np.ndarray = self.scatter / (self.count - 1)
        return covariance

    def gaussian(self) -> Gaussian:
        """Mean and covariance as they are now."""
        return Gaussian(self.mu.copy(), self.sigma, self.count)

    def _add(self, count: int, mu: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        difference = mu - self.mu
        self.mu = self.mu + difference * (count / total)
        self.scatter += scatter
        if self.count:  # in place: a second matrix of this size would cost more than the sum
            dger(self.count * count / total, difference, difference, a=self.scatter.T, overwrite_a=True)
        self.count = total


def merged(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts together; none of them changes."""
    total = Moments(len(parts[0].mu))
    for part in parts:
        total.merge(part)
    return total


def without(whole: Moments, part: Moments) -> Moments:
    """What is left of `whole` when `part`, which was merged into it, is taken away again; exact to rounding."""
    rest = Moments(len(whole.mu))
    rest.count = whole.count - part.count
    if rest.count == 0:
        return rest
    rest.mu = (whole.count * whole.mu - part.count * part.mu) / rest.count
    difference = part.mu - rest.mu
    rest.scatter = whole.scatter - part.scatter
    dger(-rest.count * part.count / whole.count, difference, difference, a=rest.scatter.T, overwrite_a=True)
    return rest


def frechet_distance(a: Gaussian | Moments, b: Gaussian | Moments) -> float:
    """Squared Frechet distance of two Gaussians: FID when the features are Inception's.

    Equal sets give about 0, possibly a hair below.

    Raises:
        UserError: fewer than 2 images on a side, or features of different extractors.
    """
    a, b = (side.gaussian() if isinstance(side, Moments) else side for side in (a, b))
    if len(a.mu) != len(b.mu):
        raise UserError(f"statistics of {len(a.mu)} and {len(b.mu)} features cannot be compared; use one extractor for both sets")
    root = _sum_of_singular_values(a.factor.T @ b.factor)
    scale = float(np.trace(a.sigma) + np.trace(b.sigma))
    distance = float(np.sum((a.mu - b.mu) ** 2)) + scale - 2 * root
    assert np.isfinite(distance) and distance > -1e-6 * max(scale, 1.0), f"a Frechet distance of {distance}"
    return distance


def fid_bias(sigma: np.ndarray) -> float:
    """c in E[FID of N images] = FID + c / N, for N images of a distribution with this covariance [D, D].

    Second-order expansion in the error of mean and covariance: with eigenvalues l of sigma, c = sum_i l_i
    + (sum_ij l_i l_j / (l_i + l_j) + sum_i l_i / 2) / 2.
    """
    values = np.linalg.eigvalsh(sigma).clip(min=0)
    values = values[values > values.max(initial=0) * 1e-15]
    pairs = 0.0
    for start in range(0, len(values), CHUNK):
        rows = values[start : start + CHUNK, None]
        pairs += float((rows * values / (rows + values)).sum())
    return float(values.sum() + 0.5 * (pairs + 0.5 * values.sum()))


def _sum_of_singular_values(matrix: np.ndarray) -> float:
    if 0 in matrix.shape:
        return 0.0
    return float(torch.linalg.svdvals(torch.from_numpy(matrix)).sum())
