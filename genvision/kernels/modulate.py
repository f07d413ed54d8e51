"""Norms that a condition modulates, and the gated sum before them: adaLN-Zero of DiT (arXiv:2212.09748, section 3.2).

On CUDA without gradients one kernel of ours reads a token once and writes its modulated norm, where torch runs three (LayerNorm) to six
(RMSNorm) that each read and write all tokens; `backends.fuses` tells when. Anywhere else the formulas below run as they stand.

Shapes: x [B, N, C]; shift, scale and gate [B, C].
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from genvision.kernels.backends import fuses

Norm = Literal["layer", "rms"]
"""LayerNorm without weights, or RMSNorm with or without them."""
MAX_WIDTH = 8192
"""Largest C of the fused kernel, which holds a whole token in registers."""


def norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor, *, kind: Norm, weight: Tensor | None = None, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift.

    Args:
        shift: None leaves it out.
        weight: [C], of RMSNorm.
        eps: of the norm.
    """
    if _fuses(x, shift, scale, weight):
        from genvision.kernels.triton_modulate import fused_norm_modulate

        return fused_norm_modulate(x, shift, scale, kind=kind, weight=weight, eps=eps)
    return modulate(_norm(x, kind, weight, eps), shift, scale)


def add_gated_norm_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor | None, scale: Tensor, *, kind: Norm, weight: Tensor | None = None, eps: float
) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch, and norm(y) (1 + scale) + shift; see `norm_modulate`."""
    if _fuses(x, shift, scale, weight, gate, branch):
        from genvision.kernels.triton_modulate import fused_add_gated_norm_modulate

        return fused_add_gated_norm_modulate(x, gate, branch, shift, scale, kind=kind, weight=weight, eps=eps)
    x = add_gated(x, gate, branch)
    return x, modulate(_norm(x, kind, weight, eps), shift, scale)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    factor = (1 + scale).unsqueeze(1)
    return x * factor if shift is None else shift.unsqueeze(1).addcmul(x, factor)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch."""
    return x.addcmul(gate.unsqueeze(1), branch)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight (arXiv:1910.07467), the quotient in float32 and cast back before the weight; x [..., C]."""
    quotient = F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x)
    return quotient if weight is None else quotient * weight


def _norm(x: Tensor, kind: Norm, weight: Tensor | None, eps: float) -> Tensor:
    return rms_norm(x, weight, eps) if kind == "rms" else F.layer_norm(x, x.shape[-1:], eps=eps)


def _fuses(x: Tensor, *others: Tensor | None) -> bool:
    """Several precisions at once are left to torch's rules."""
    return fuses(x, *others) and x.shape[-1] <= MAX_WIDTH and all(other is None or other.dtype == x.dtype for other in others)
