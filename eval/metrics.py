"""What is computed from features and pixels: moments, Frechet distance (FID), Inception Score, PSNR, SSIM.

FID and Inception Score go through torch-fidelity's own functions; the moments that FID compares are ours, so that features of
50,000 images are never held at once.

Shapes: N images, D features, K logits, images uint8 [N, H, W, 3].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError

SSIM_WINDOW = 7


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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain arrays, for an npz file or a gather over processes."""
        return {"count": self.count, "mu": self.mu, "scatter": self.scatter}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Moments":
        """The inverse of `to_dict`, exactly."""
        moments = cls(len(content["mu"]))
        moments.count = int(content["count"])
        moments.mu = np.array(content["mu"], dtype=np.float64)
        moments.scatter = np.array(content["scatter"], dtype=np.float64)
        return moments

    def _add(self, count: int, mu: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        difference = mu - self.mu
        self.mu = self.mu + difference * (count / total)
        self.scatter = self.scatter + scatter + np.outer(difference, difference) * (self.count * count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, torch-fidelity's formula: FID when the features are Inception's.

    Equal sets give about 0, possibly a hair below.

    Raises:
        UserError: fewer than 2 images on a side, or features of different extractors.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # 2 s

    if len(a.mu) != len(b.mu):
        raise UserError(f"statistics of {len(a.mu)} and {len(b.mu)} features cannot be compared; use one extractor for both sets")
    sides = [{"mu": side.mu, "sigma": side.sigma} for side in (a, b)]
    return float(fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])


class InceptionScore(NamedTuple):
    mean: float
    std: float
    """Population deviation over the splits: their spread, not a standard error."""


def inception_score(logits: np.ndarray | Tensor, splits: int = 10, shuffle_seed: int | None = 2020) -> InceptionScore:
    """exp of the mean divergence between each image's classes and those of its split, averaged over splits (arXiv:1606.03498).

    Args:
        logits: [N, K], before the softmax.
        splits: the N images are cut into so many parts, equal to within one.
        shuffle_seed: order them at random first, so that sets sorted by class score as others do; None keeps the order.

    Raises:
        UserError: fewer images than splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric  # 2 s

    tensor = torch.as_tensor(logits)
    if len(tensor) < max(splits, 2):
        raise UserError(
            f"the inception score of {splits} splits needs at least {max(splits, 2)} images, got {len(tensor)}; give more images"
        )
    score = isc_features_to_metric(tensor, splits=splits, shuffle=shuffle_seed is not None, rng_seed=shuffle_seed)
    return InceptionScore(score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in decibels, float64 [N]; infinite for equal images."""
    check_pairs(a, b)
    squared_error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        decibels: np.ndarray = 10 * np.log10(255.0**2 / squared_error)
    return decibels


def ssim(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each pair, float64 [N], as scikit-image computes it by default.

    Uniform 7x7 window, sample covariance, K1 0.01, K2 0.03, mean over the positions where the window fits and over channels.

    Args:
        data_range: of the images scaled to [0, 1], so 1 is right; LlamaGen's published values use 2, which is kinder.
    """
    check_pairs(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}; use larger images"
        )
    x, y = (torch.from_numpy(image / 255.0).permute(0, 3, 1, 2) for image in (a, b))  # [N, 3, H, W]
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    to_sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_x = to_sample * (_window_mean(x * x) - mean_x**2)
    variance_y = to_sample * (_window_mean(y * y) - mean_y**2)
    covariance = to_sample * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    similarity: np.ndarray = (luminance * structure).mean(dim=(1, 2, 3)).numpy()
    return similarity


def check_pairs(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse anything but two uint8 [N, H, W, 3] arrays of one shape."""
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4 or a.shape != b.shape:
        raise UserError(f"pairs of images must be uint8 [N, H, W, 3] of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SSIM_WINDOW, stride=1)
