"""Keeping predicted clean images in range (dynamic thresholding: Imagen, arXiv:2205.11487, section 2.3); for pixels, not for latents."""

from typing import Literal

import torch
from torch import Tensor

from genvision.objectives.paths import over

Threshold = Literal["none", "clip", "dynamic"]


def dynamic_threshold(clean: Tensor, ratio: float, maximum: float) -> Tensor:
    """Each image cut to [-s, s] and divided by s, where s is a quantile of |x| in [1, maximum]; `maximum` 1 is plain clipping.

    Args:
        clean: [B, ...], float32 or float64.
        ratio: of the quantile, with linear interpolation.
        maximum: of s, at least 1.

    Returns:
        The same shape, in [-1, 1].
    """
    s = over(_quantile(clean.flatten(1).abs(), ratio).clamp(1, maximum), clean)
    return clean.clamp(-s, s) / s


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """Of each row [B, N], with linear interpolation; torch.quantile refuses more than 2^24 values."""
    place = ratio * (values.shape[1] - 1)
    ordered = values.sort(dim=1).values
    low = int(place)
    high = min(low + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], place - low)
