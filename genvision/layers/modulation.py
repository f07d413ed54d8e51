"""Adaptive layer norm: what a condition does to tokens (adaLN-Zero of DiT, arXiv:2212.09748, section 3.2).

Shapes: x [B, N, C]; shift, scale and gate [B, C].
"""

from typing import Any

from torch import Tensor, nn

from genvision.kernels.backends import fuses
from genvision.kernels.modulate import add_gated, add_gated_norm_modulate, modulate, norm_modulate
from genvision.layers.norm import norm_options

__all__ = ["add_gated", "gated_then_modulated", "modulate", "modulated"]


def modulated(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """modulate(norm(x), shift, scale), in one pass over x where a kernel of ours does it.

    Args:
        norm: LayerNorm without weights or RMSNorm; any other runs by itself.
    """
    options = _options(norm) if fuses(x) else None  # the question costs a microsecond, taking a norm apart several
    return modulate(norm(x), shift, scale) if options is None else norm_modulate(x, shift, scale, **options)


def gated_then_modulated(
    norm: nn.Module, x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """y = add_gated(x, gate, branch) and modulated(norm, y, shift, scale)."""
    options = _options(norm) if fuses(x) else None
    if options is None:
        x = add_gated(x, gate, branch)
        return x, modulate(norm(x), shift, scale)
    return add_gated_norm_modulate(x, gate, branch, shift, scale, **options)


def _options(norm: nn.Module) -> dict[str, Any] | None:
    """What `norm_modulate` is told; None for a norm that it does not know."""
    options = norm_options(norm)
    if options is None or options.bias is not None or (options.kind == "layer" and options.weight is not None):
        return None
    return {"kind": options.kind, "weight": options.weight, "eps": options.eps}
