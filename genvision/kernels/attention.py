"""The one attention call of the codebase; it chooses the back end.

plain      the formula itself in float32, which the others are tested against
sdpa       torch's scaled_dot_product_attention, which chooses among its own kernels
flash, efficient, cudnn
           one of these kernels of torch, only when forced
flex       FlexAttention, which skips blocks of keys that nobody may see, only when forced: it compiles anew for every shape, which takes
           seconds, and gains on long sequences only; on a CPU it takes 1.4 times the time of sdpa, and knows no backward pass there
triton     our kernel, for sampling: no gradients, dropout, masks or causality

GENVISION_ATTENTION=NAME forces one for the whole process (see `backends.forced_backend`). A forced one that cannot do a call is an error.

Shapes: B rows, N queries, M keys, H query heads, G key heads, D head size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError
from genvision.kernels.backends import VARIABLE, Backend, forced_backend, needs_gradient, triton_runs, under_autocast

HALF = (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [B, H, N, D].
        k: [B, G, M, D]; where G < H, query head h reads key head h // (H / G).
        v: [B, G, M, D].
        mask: boolean, broadcastable to [B, H, N, M]; True where a query may look.
        is_causal: query i sees keys 0..i; needs N = M and no mask.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, N, D].

    Raises:
        UserError: a back end is forced that cannot do this call.
    """
    forced = forced_backend()
    backend: Backend = "sdpa"
    if forced is not None or q.is_cuda:  # elsewhere there is nothing to choose, and asking would take as long as a tenth of a tiny call
        # the compiler sees only operations of torch, and autocast changes only those
        triton = not torch.compiler.is_compiling() and not under_autocast(q.device) and triton_runs(q.device)
        backend = choose_backend(
            q.shape,
            k.shape,
            dtype=q.dtype,
            device=q.device.type,
            masked=mask is not None,
            is_causal=is_causal,
            dropout=dropout,
            needs_grad=needs_gradient(q, k, v),
            triton=triton,
            forced=forced,
        )
    grouped = q.shape[1] != k.shape[1]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped)
    if backend == "triton":
        from genvision.kernels.triton_attention import fused_attention

        return fused_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if backend == "flex":
        return _flex(q, k, v, mask, is_causal)
    if backend == "plain":
        return plain_attention(q, k, v, mask=mask, is_causal=is_causal, dropout=dropout)
    return _one_of_torch(backend, q, k, v, dict(attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=grouped))


def choose_backend(
    query: Sequence[int],
    key: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str,
    masked: bool,
    is_causal: bool,
    dropout: float,
    needs_grad: bool,
    triton: bool,
    forced: Backend | None,
) -> Backend:
    """The back end for one call of `attention`.

    Torch's own choice, with one exception on CUDA: its fast kernels want head sizes that are multiples of 8, so that it copies queries,
    keys and values of others (100, say) into padded tensors. Ours pads in registers, and takes those where it can.

    Args:
        query: [B, H, N, D] as numbers.
        key: [B, G, M, D] as numbers.
        device: `cpu`, `cuda`, ...
        masked: whether a mask is given.
        needs_grad: whether autograd records the call.
        triton: whether Triton kernels can run on the device here and now.
        forced: what the user forces.

    Raises:
        UserError: the forced one cannot do it.
    """
    on_cuda, half = device == "cuda", dtype in HALF
    _, num_heads, num_queries, head_dim = query
    dtype_name = str(dtype).removeprefix("torch.")
    if forced is None:
        fits = on_cuda and triton and half and not (masked or is_causal or dropout or needs_grad)
        return "triton" if fits and head_dim % 8 != 0 and head_dim <= 128 and num_queries >= 16 else "sdpa"
    obstacles: dict[Backend, dict[str, bool]] = {
        "plain": {},
        "sdpa": {},
        "flash": {
            "a mask": masked,
            f"{dtype_name} on CUDA (float16 and bfloat16 only)": on_cuda and not half,
            "head sizes above 256": head_dim > 256,
            f"dropout on device {device}": dropout > 0 and not on_cuda,
        },
        "efficient": {f"device {device} (CUDA only)": not on_cuda, "grouped queries": key[1] != num_heads},
        "cudnn": {
            f"device {device} (CUDA only)": not on_cuda,
            f"{dtype_name} (float16 and bfloat16 only)": not half,
            f"head size {head_dim} (multiples of 8 only)": head_dim % 8 != 0,
        },
        "flex": {"dropout": dropout > 0, f"gradients on device {device}": needs_grad and not on_cuda},
        "triton": {
            "gradients (it is for sampling)": needs_grad,
            "a mask": masked,
            "causal attention": is_causal,
            "dropout": dropout > 0,
            "head sizes above 256": head_dim > 256,
            f"device {device} here (it needs CUDA and the package triton, without torch.compile and autocast)": not triton,
        },
    }
    for what, stands_in_the_way in obstacles[forced].items():
        if stands_in_the_way:
            raise UserError(f"{VARIABLE}={forced} cannot do {what}; unset it or set it to sdpa")
    return forced


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """`attention` by its formula, in float32."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(groups, dim=1) if groups > 1 else x.float() for x in (k, v))  # each [B, H, M, D]
    scores = (q.float() * q.shape[-1] ** -0.5) @ keys.transpose(-2, -1)  # [B, H, N, M]
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (F.dropout(scores.softmax(dim=-1), dropout) @ values).type_as(q)


def _one_of_torch(backend: Backend, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    with sdpa_kernel(kernels[backend]):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The mask is read once more, to find the blocks of 128 x 128 that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    blocks = None
    if mask is not None:
        visible = mask.expand(shape)
        blocks = create_block_mask(lambda b, h, i, j: visible[b, h, i, j], *shape, device=q.device.type)
    elif is_causal:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, *shape[2:], device=q.device.type)
    call = _compiled_flex() if q.is_cuda else flex_attention  # without compilation it is the plain formula
    return call(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
