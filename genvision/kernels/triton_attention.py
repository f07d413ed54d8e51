"""Our attention kernels in Triton, for sampling: every query sees every key, and there is no backward pass.

`prepare_heads` normalises and turns queries and keys, both in one pass, from where the fused projection wrote them; `fused_attention` is
softmax(q k^T / sqrt(D)) v with a running maximum and sum (FlashAttention-2, arXiv:2307.08691, algorithm 1), for strided tensors.
They are two kernels on purpose. N / 128 blocks of queries read each key; a kernel that did all would normalise and turn a key as often,
between the load and the product, where the hardware copies keys straight into shared memory while the product before still runs. Once per
key costs one write and one read of queries and keys, and the output of `prepare_heads` goes to any other back end just as well.

A head is padded to the next power of two in registers and shared memory only: 72 channels take the products of 128.

Shapes: B rows, N queries, M keys, H query heads, G key heads, D head size, P its padded size.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd, log2

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How the work is divided."""

    queries: int
    """Of one program."""
    keys: int
    """Of one step of its loop."""
    num_warps: int
    num_stages: int
    """Key blocks on their way at once."""


def attention_blocks(head_dim: int, num_queries: int, itemsize: int, capability: int) -> Blocks:
    """For head size D, N queries, bytes of a number, and compute capability (80, 90, ...).

    128 queries a program, where the sequence is longer than 256; for shorter ones 64 keep more of the card busy. Numbers of four bytes
    are multiplied outside tensor cores, and a program holds a quarter of them.
    """
    padded = padded_size(head_dim)
    if itemsize > 2:
        return Blocks(32, 32, num_warps=4, num_stages=2) if padded <= 64 else Blocks(16, 16, num_warps=4, num_stages=1)
    queries = 16 if num_queries <= 16 else 64 if num_queries <= 256 else 128
    # addresses of rows that are not aligned to 16 bytes take more registers
    keys = 32 if head_dim % 8 != 0 or padded > 128 else 64
    return Blocks(queries, keys, num_warps=8 if queries == 128 else 4, num_stages=3 if capability >= 90 and padded <= 128 else 2)


def padded_size(size: int) -> int:
    """The next power of two, 16 at least, which is the least that a product takes."""
    return max(16, 1 << (size - 1).bit_length())


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [B, N, H, D], a view with any strides but that of channels, which is 1.
        k: [B, M, G, D]; query head h reads key head h // (H / G).
        v: [B, M, G, D].

    Returns:
        [B, N, H, D], contiguous.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    rows, num_queries, num_heads, head_dim = q.shape
    num_keys, groups = k.shape[1], num_heads // k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = attention_blocks(head_dim, num_queries, q.element_size(), _capability(q.device))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    unit = gcd(16, *strides)
    with torch.cuda.device_of(q):
        attention_kernel[(triton.cdiv(num_queries, blocks.queries) * rows * num_heads,)](
            q,
            k,
            v,
            out,
            num_queries,
            num_keys,
            num_heads,
            *(stride // unit for stride in strides),
            head_dim**-0.5 * log2(torch.e),
            GROUPS=groups,
            D=head_dim,
            PADDED=padded_size(head_dim),
            QUERIES=blocks.queries,
            KEYS=blocks.keys,
            WHOLE=num_keys % blocks.keys == 0,
            UNIT=unit,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out


def prepare_heads(
    heads: Tensor,
    rotary: Tensor | None,
    *,
    kind: str | None,
    eps: float,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
) -> Tensor:
    """Queries and keys, normalised over D (float32) and then turned.

    Args:
        heads: [B, N, 2H, D], H of queries and H of keys; a view whose heads lie one behind the other.
        rotary: float32 [N, D / 2, 2] or [H, N, D / 2, 2]: cosine and sine by which channels 2j and 2j + 1 turn.
        kind: `layer` or `rms`; None leaves them.
        eps: of the norm.
        q_weight, q_bias, k_weight, k_bias: [D] each, those of the norm.

    Returns:
        [B, N, 2H, D], contiguous.
    """
    rows, num_tokens, both, head_dim = heads.shape
    if heads.stride()[2:] != (head_dim, 1):
        heads = heads.contiguous()
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    table = rotary.contiguous() if rotary is not None else None
    padded = padded_size(head_dim)
    num_heads_at_once = heads_at_once(padded)
    unit = gcd(16, *heads.stride()[:2])
    with torch.cuda.device_of(heads):
        prepare_kernel[(triton.cdiv(num_tokens * both, num_heads_at_once), rows)](
            heads,
            out,
            q_weight,
            q_bias,
            k_weight,
            k_bias,
            table,
            num_tokens * both,
            both // 2,
            heads.stride(0) // unit,
            heads.stride(1) // unit,
            num_tokens if rotary is not None and rotary.dim() == 4 else 0,
            eps,
            KIND=kind,
            D=head_dim,
            PADDED=padded,
            HEADS=num_heads_at_once,
            UNIT=unit,
            num_warps=4,
        )
    return out


def heads_at_once(padded: int) -> int:
    """Of one program of `prepare_kernel`: 16 numbers for each of its threads."""
    return max(1, 2048 // padded)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    num_queries,
    num_keys,
    num_heads,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    scale,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One block of queries of one head. Strides come in units, so that the compiler knows how far addresses are aligned; `scale` holds
    log2(e), as powers of two are what the hardware computes."""
    blocks = tl.cdiv(num_queries, QUERIES)
    head = tl.program_id(0) // blocks % num_heads
    row = (tl.program_id(0) // blocks // num_heads).to(tl.int64)
    query = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    q_ptr += (row * q_row + head * q_head) * UNIT
    k_ptr += (row * k_row + head // GROUPS * k_head) * UNIT
    v_ptr += (row * v_row + head // GROUPS * v_head) * UNIT
    real = (query < num_queries)[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + (query * q_token * UNIT)[:, None] + channel[None, :], mask=real, other=0.0)  # [QUERIES, P]
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, num_keys, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = (channel < D)[None, :] if WHOLE else (key < num_keys)[:, None] & (channel < D)[None, :]
        k = tl.load(k_ptr + (key * k_token * UNIT)[:, None] + channel[None, :], mask=seen, other=0.0)  # [KEYS, P]
        scores = tl.dot(q, k.T, input_precision="ieee") * scale  # [QUERIES, KEYS]
        if not WHOLE:
            scores = tl.where((key < num_keys)[None, :], scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(v_ptr + (key * v_token * UNIT)[:, None] + channel[None, :], mask=seen, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        top = highest
    at = ((row * num_queries + query) * num_heads + head) * D
    tl.store(out_ptr + at[:, None] + channel[None, :], (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def prepare_kernel(
    x_ptr,
    out_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    table_ptr,
    num_rows,
    num_heads,
    x_row,
    x_token,
    table_head,
    eps,
    KIND: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Some heads of some tokens of one row, whose 2 N H heads are counted through; pointers that are None are of what is left out."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    token, head = place // (2 * num_heads), place % (2 * num_heads)
    channel = tl.arange(0, PADDED)
    real = (place < num_rows)[:, None] & (channel < D)[None, :]
    is_key = (head >= num_heads)[:, None]
    at = row * x_row * UNIT + (token * x_token * UNIT + head * D)[:, None] + channel[None, :]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)  # [HEADS, P]
    if KIND == "layer":
        x = tl.where(real, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    if KIND is not None:
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    if q_weight_ptr is not None:
        x *= _of_its_kind(q_weight_ptr, k_weight_ptr, is_key, channel, D)
    if q_bias_ptr is not None:
        x += _of_its_kind(q_bias_ptr, k_bias_ptr, is_key, channel, D)
    if table_ptr is not None:
        angle = ((head % num_heads) * table_head + token) * D
        turn = tl.load(table_ptr + angle[:, None] + channel[None, :], mask=real, other=0.0)
        even, odd = tl.split(tl.reshape(x, (HEADS, PADDED // 2, 2)))
        cos, sin = tl.split(tl.reshape(turn, (HEADS, PADDED // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HEADS, PADDED))
    out_at = (row * num_rows + place)[:, None] * D + channel[None, :]
    tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _of_its_kind(q_ptr, k_ptr, is_key, channel, D: tl.constexpr):
    q = tl.load(q_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
    return tl.where(is_key, k[None, :], q[None, :])


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
