"""One token's attention against its cache as a Triton kernel (flash-decoding where rows are few).

A program reads the keys and values of one key head of one row, or a share of them, once for all query heads that look there (for up to
eight of them; more would not fit into registers). Nothing in the launch depends on how full the cache is, so that one CUDA graph serves
every position.

Shapes: B rows, H query heads, G key heads, D head size, M positions of the cache, S splits.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES_OF_TILE = 8192
"""Of keys, and of values, that a program has in work at once."""
NUMBERS_OF_TILE = 8192
"""Products of queries and keys that a program holds in registers at once: 64 a thread."""
MOST_QUERIES = 8
"""Query heads of a program."""
NUM_WARPS = 4
NUM_STAGES = 3
"""Tiles on their way at once: two are loaded while one is worked on."""
SMALLEST_SHARE = 128
"""Positions under which a split costs more than it gains, since the second kernel has its price."""
MOST_SPLITS = 16


def decode_attention_triton(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    position: int | Tensor,
    *,
    rotary: Tensor | None = None,
    first: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """`genvision.kernels.decode.decode_attention`, which says what the arguments are.

    Args:
        splits: programs that share a row's keys; None chooses by `num_splits`.
    """
    rows, num_groups, length, head_dim = keys.shape
    num_heads = heads.shape[1] - 2 * num_groups
    if heads.stride(2) != 1:
        heads = heads.contiguous()
    assert keys.stride(3) == 1 and keys.stride() == values.stride()
    assert isinstance(position, Tensor) or position < length
    group = num_heads // num_groups
    constants = tile_constants(group, head_dim, keys.element_size(), (keys.stride(0), keys.stride(1)))
    programs = rows * num_heads // constants["QUERIES"]
    if splits is None:
        splits = num_splits(programs, length, _num_multiprocessors(heads.device))
    out = heads.new_empty(rows, num_heads, head_dim)
    partial = statistics = None
    if splits > 1:
        partial = heads.new_empty(rows, num_heads, splits, head_dim, dtype=torch.float32)
        statistics = heads.new_empty(rows, num_heads, splits, 2, dtype=torch.float32)
    with torch.cuda.device_of(heads):  # Triton starts kernels on the current device, whatever the tensors are on
        decode[(programs, splits)](
            heads,
            keys,
            values,
            out,
            partial,
            statistics,
            rotary if rotary is None else rotary.contiguous(),
            first,
            position if isinstance(position, Tensor) else None,
            0 if isinstance(position, Tensor) else position,
            heads.stride(0),
            heads.stride(1),
            keys.stride(0),
            keys.stride(1),
            HEADS=num_heads,
            GROUP=group,
            D=head_dim,
            SPLITS=splits,
            STRIDE=keys.stride(2),
            num_warps=NUM_WARPS,
            **constants,
        )
        if splits > 1:
            join_splits[(rows * num_heads,)](
                partial, statistics, out, D=head_dim, PADDED_D=triton.next_power_of_2(head_dim), SPLITS=splits, num_warps=1
            )
    return out


def num_splits(programs: int, length_bound: int, num_sms: int) -> int:
    """Programs that share the keys of one: a power of two, and 1 unless half of the card is idle.

    Args:
        programs: without splits, rows times key heads.
        length_bound: positions that the cache can hold; that of a graph must not depend on how many are filled.
        num_sms: multiprocessors of the card.
    """
    splits = 1
    while 2 * splits * programs <= num_sms and 2 * splits * SMALLEST_SHARE <= length_bound and splits < MOST_SPLITS:
        splits *= 2
    return splits


def tile_constants(group: int, head_dim: int, element_size: int, strides: tuple[int, ...]) -> dict[str, int]:
    """What the kernel is compiled for beside the model's own sizes.

    Args:
        group: query heads of a key head.
        strides: of the cache's rows and key heads, in numbers.
    """
    queries = max(number for number in range(1, MOST_QUERIES + 1) if group % number == 0)
    padded_d, padded_queries = triton.next_power_of_2(head_dim), triton.next_power_of_2(queries)
    block = min(BYTES_OF_TILE // (padded_d * element_size), NUMBERS_OF_TILE // (padded_d * padded_queries))
    align = 16
    while any(stride % align for stride in strides):
        align //= 2
    sizes = {"QUERIES": queries, "PADDED_QUERIES": padded_queries, "PADDED_D": padded_d, "BLOCK": max(8, min(block, 128))}
    return sizes | {"ALIGN": align, "STAGES": NUM_STAGES}


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["position"])
def decode(
    heads,
    keys,
    values,
    out,
    partial,
    statistics,
    rotary,
    first,
    position_at,
    position,
    heads_row,
    heads_head,
    cache_row,
    cache_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED_QUERIES: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid [B H / QUERIES, S]. Every slot of a tile keeps its own running softmax; they meet behind the loop, so that threads never wait.

    With splits, a program leaves numerators in `partial` and (maximum, denominator) in `statistics`, in base 2; else the answer in `out`.
    """
    query, split = tl.program_id(0) * QUERIES, tl.program_id(1)  # the first query of this program, of all B H
    row, head = query // HEADS, query % HEADS
    group = head // GROUP
    if position_at is not None:
        position = tl.load(position_at).to(tl.int32)
    begin = 0
    if first is not None:
        begin = tl.load(first + row).to(tl.int32)
    d = tl.arange(0, PADDED_D)
    h = tl.arange(0, PADDED_QUERIES)
    in_head = d < D
    cos = tl.full([PADDED_D], 1.0, tl.float32)
    sin = tl.zeros([PADDED_D], tl.float32)
    if rotary is not None:
        cos = tl.load(rotary + position * D + (d - d % 2), mask=in_head, other=0.0)
        sin = tl.load(rotary + position * D + (d - d % 2) + 1, mask=in_head, other=0.0)
        sin = tl.where(d % 2 == 0, -sin, sin)

    # the new token; its key and value come from registers, since the program that writes them may be another one
    new = heads + row.to(tl.int64) * heads_row
    queries = new + (head + h[:, None]) * heads_head
    asked = (h[:, None] < QUERIES) & in_head[None, :]
    q = tl.load(queries + d[None, :], mask=asked, other=0.0).to(tl.float32)
    key, value = new + (HEADS + group) * heads_head, new + (HEADS + HEADS // GROUP + group) * heads_head
    k_new = tl.load(key + d, mask=in_head, other=0.0).to(tl.float32)
    v_new = tl.load(value + d, mask=in_head, other=0.0)
    if rotary is not None:
        q = q * cos + tl.load(queries + (d ^ 1)[None, :], mask=asked, other=0.0).to(tl.float32) * sin
        k_new = k_new * cos + tl.load(key + (d ^ 1), mask=in_head, other=0.0).to(tl.float32) * sin
    q *= 1.4426950408889634 / tl.sqrt(D + 0.0)  # log2(e): powers of two below
    k_new = k_new.to(keys.dtype.element_ty)
    base = tl.multiple_of(row.to(tl.int64) * cache_row + group.to(tl.int64) * cache_head, ALIGN)
    keys += base
    values += base
    write = in_head & (split == 0) & (head % GROUP == 0)
    tl.store(keys + position * STRIDE + d, k_new, mask=write)
    tl.store(values + position * STRIDE + d, v_new.to(values.dtype.element_ty), mask=write)

    # the positions before it, of which this program has a share
    share = tl.cdiv(tl.cdiv(position - begin, SPLITS), BLOCK) * BLOCK
    begin += split * share
    end = tl.minimum(begin + share, position)
    top = tl.full([PADDED_QUERIES, BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([PADDED_QUERIES, BLOCK], tl.float32)
    acc = tl.zeros([PADDED_QUERIES, BLOCK, PADDED_D], tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK)
        at = (i * STRIDE)[None, :, None] + d[None, None, :]
        there = (i < end)[None, :, None] & in_head[None, None, :]
        k = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)  # [1, BLOCK, D]
        v = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        score = tl.where((i < end)[None, :], tl.sum(q[:, None, :] * k, 2), -float("inf"))
        higher = tl.maximum(top, score)
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # of a slot that has seen nothing yet
        fade, weight = tl.exp2(top - finite), tl.exp2(score - finite)
        total = total * fade + weight
        acc = acc * fade[:, :, None] + weight[:, :, None] * v
        top = higher

    score = tl.where(split == 0, tl.sum(q * k_new.to(tl.float32)[None, :], 1), -float("inf"))  # [QUERIES], the new token's
    highest = tl.maximum(tl.max(top, 1), score)
    finite = tl.where(highest == -float("inf"), 0.0, highest)
    fade, weight = tl.exp2(top - finite[:, None]), tl.exp2(score - finite)
    denominator = tl.sum(total * fade, 1) + weight
    numerator = tl.sum(acc * fade[:, :, None], 1) + weight[:, None] * v_new.to(tl.float32)[None, :]
    query += h
    if SPLITS == 1:
        answer = (numerator / denominator[:, None]).to(out.dtype.element_ty)
        tl.store(out + query[:, None] * D + d[None, :], answer, mask=asked)
    else:
        part = query * SPLITS + split
        tl.store(partial + part[:, None] * D + d[None, :], numerator, mask=asked)
        tl.store(statistics + part * 2, highest, mask=h < QUERIES)
        tl.store(statistics + part * 2 + 1, denominator, mask=h < QUERIES)


@triton.jit
def join_splits(partial, statistics, out, D: tl.constexpr, PADDED_D: tl.constexpr, SPLITS: tl.constexpr):
    """Grid [B H]: the answer of one query head from its S parts; the first of them has seen the new token, so its maximum is finite."""
    query = tl.program_id(0)
    part = query * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, PADDED_D)
    top = tl.load(statistics + part * 2)
    weight = tl.exp2(top - tl.max(top, 0))
    denominator = tl.sum(weight * tl.load(statistics + part * 2 + 1), 0)
    parts = tl.load(partial + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    answer = tl.sum(weight[:, None] * parts, 0) / denominator
    tl.store(out + query * D + d, answer.to(out.dtype.element_ty), mask=d < D)
