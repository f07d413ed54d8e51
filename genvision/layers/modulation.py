"""Adaptive layer norm: what a condition does to tokens (adaLN-Zero of DiT, arXiv:2212.09748, section 3.2).

Shapes: x [B, N, C]; shift, scale and gate [B, C].
"""

from torch import Tensor


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    factor = (1 + scale).unsqueeze(1)
    return x * factor if shift is None else shift.unsqueeze(1).addcmul(x, factor)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch."""
    return x.addcmul(gate.unsqueeze(1), branch)
