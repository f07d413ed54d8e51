"""PSNR and SSIM: what is computed from the pixels of pairs of images.

Shapes: N pairs, images uint8 [N, H, W, 3].
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError

PSNR_RANGE = 255.0
SSIM_WINDOW = 7


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in decibels, float64 [N], for a range of 255; infinite for equal images."""
    check_pairs(a, b)
    squared_error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        decibels: np.ndarray = 10 * np.log10(PSNR_RANGE**2 / squared_error)
    return decibels


def ssim(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each pair, float64 [N], as scikit-image computes it by default.

    Uniform 7x7 window, sample covariance, K1 0.01, K2 0.03, mean over the positions where the window fits and over channels.

    Args:
        data_range: of the images scaled to [0, 1], so 1 is right; LlamaGen's published values use 2, which is kinder.

    Raises:
        UserError: images smaller than the window.
    """
    return ssims(a, b, (data_range,))[0]


def ssims(a: np.ndarray, b: np.ndarray, data_ranges: Sequence[float]) -> list[np.ndarray]:
    """`ssim` for several ranges at little more than the cost of one."""
    check_pairs(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}; use larger images"
        )
    x, y = (torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)) / 255.0) for image in (a, b))  # [N, 3, H, W]
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    to_sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variances = to_sample * (_window_mean(x.square() + y.square()) - mean_x.square() - mean_y.square())  # of x and y together
    covariance = to_sample * (_window_mean(x * y) - mean_x * mean_y)
    squares, product = mean_x.square() + mean_y.square(), mean_x * mean_y
    similarities = []
    for data_range in data_ranges:
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        luminance = (2 * product + c1) / (squares + c1)
        structure = (2 * covariance + c2) / (variances + c2)
        similarities.append((luminance * structure).mean(dim=(1, 2, 3)).numpy())
    return similarities


def check_pairs(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse anything but two uint8 [N, H, W, 3] arrays of one shape."""
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4 or a.shape[-1] != 3 or a.shape != b.shape:
        raise UserError(f"pairs of images must be uint8 [N, H, W, 3] of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")


def _window_mean(x: Tensor) -> Tensor:
    # along one axis after the other: 14 additions a pixel instead of 49
    return F.avg_pool2d(F.avg_pool2d(x, (SSIM_WINDOW, 1), stride=1), (1, SSIM_WINDOW), stride=1)
