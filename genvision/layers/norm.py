"""Normalisation layers."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genvision.kernels.modulate import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467), the quotient in float32 and cast back before the weight."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class NormOptions(NamedTuple):
    """What a norm does, for kernels that do it in passing."""

    kind: Literal["layer", "rms"] | None
    """None for no norm at all."""
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def norm_options(norm: nn.Module | None) -> NormOptions | None:
    """None for a module that kernels do not know, such as a layer that an adapter wraps."""
    if norm is None:
        return NormOptions(None, None, None, 0.0)
    if isinstance(norm, RMSNorm):
        return NormOptions("rms", norm.weight, None, norm.eps)
    return NormOptions("layer", norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None
