"""Modulated norms in Triton, for sampling: a token is read once, and the sum before its norm is written on the way.

All arithmetic is in float32, and only what is stored is rounded: `y` before it is normalised too, as if it had been read again.

Shapes: x [B, N, C]; shift, scale and gate [B, C].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def fused_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor, *, kind: str, weight: Tensor | None, eps: float) -> Tensor:
    """`kernels.modulate.norm_modulate`; all tensors are of one precision."""
    return _launch(x, None, None, shift, scale, kind, weight, eps)[1]


def fused_add_gated_norm_modulate(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor | None, scale: Tensor, *, kind: str, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`kernels.modulate.add_gated_norm_modulate`."""
    return _launch(x, gate, branch, shift, scale, kind, weight, eps)


def warps_for(width: int) -> int:
    """A warp for each 256 channels: a thread holds 8, which are one load of 128 bits in half precision."""
    return max(1, min(16, triton.next_power_of_2(width) // 256))


def _launch(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    kind: str,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, which is x itself without a gate, and its modulated norm."""
    x = x.contiguous()
    branch = branch.contiguous() if branch is not None else None
    assert all(part is None or part.stride(1) == 1 for part in (shift, scale, gate)), "parts of one row of modulation are views of it"
    rows, num_tokens, width = x.shape
    out = torch.empty_like(x)
    added = torch.empty_like(x) if gate is not None else x
    with torch.cuda.device_of(x):
        modulate_kernel[(num_tokens, rows)](
            x,
            branch,
            gate,
            weight,
            shift,
            scale,
            added,
            out,
            num_tokens,
            width,
            gate.stride(0) if gate is not None else 0,
            shift.stride(0) if shift is not None else 0,
            scale.stride(0),
            eps,
            KIND=kind,
            WIDTH=triton.next_power_of_2(width),
            num_warps=warps_for(width),
        )
    return added, out


@triton.jit
def modulate_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    weight_ptr,
    shift_ptr,
    scale_ptr,
    added_ptr,
    out_ptr,
    num_tokens,
    width,
    gate_row,
    shift_row,
    scale_row,
    eps,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token; pointers that are None are of what is left out."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = channel < width
    at = (row * num_tokens + tl.program_id(0)) * width + channel
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * gate_row + channel, mask=real, other=0.0).to(tl.float32)
        added = (x + gate * tl.load(branch_ptr + at, mask=real, other=0.0).to(tl.float32)).to(added_ptr.dtype.element_ty)
        tl.store(added_ptr + at, added, mask=real)
        x = added.to(tl.float32)
    if KIND == "layer":
        x = tl.where(real, x - tl.sum(x, 0) / width, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    x *= 1 + tl.load(scale_ptr + row * scale_row + channel, mask=real, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + row * shift_row + channel, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=real)
