"""The whole draw of a token in one kernel: guidance, temperature, top-k, top-p and the inverse CDF, without leaving the device.

One program an image. It never sorts: the k-th largest logit, and the border of the nucleus, are found by bisection over the 2^32 float32
values, read as integers of the same order. Each of the at most 32 passes counts (or weighs) what lies above the middle; the rows stay in
the cache meanwhile, 64 KiB each at V = 16384. See `draw` for what is computed and why all forms agree.

Shapes: B images, V codebook entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genvision.kernels.draw import MIN_TEMPERATURE

LOWEST_KEY = tl.constexpr(-2139095041)
"""Of -inf."""
NO_COLUMN = tl.constexpr(2**31 - 1)


def draw_in_one_kernel(
    logits: Tensor,
    uniform: Tensor,
    *,
    guidance_scale: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    block: int | None = None,
) -> Tensor:
    """`draw.draw_tokens`, which says what the arguments are.

    Args:
        block: columns that are read at once, a power of two from 32 up; None chooses by `columns_at_once`.
    """
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    images = rows if guidance_scale is None else rows // 2
    tokens = torch.empty(images, dtype=torch.int64, device=logits.device)
    block = columns_at_once(vocabulary) if block is None else block
    with torch.cuda.device_of(logits):  # does nothing on a CPU
        draw_kernel[(images,)](
            logits,
            uniform,
            tokens,
            vocabulary,
            uniform.stride(0),
            1.0 if guidance_scale is None else float(guidance_scale),
            1 / max(temperature, MIN_TEMPERATURE),
            top_k,
            GUIDED=guidance_scale is not None,
            GREEDY=temperature == 0,
            TOP_K=0 < top_k < vocabulary,
            TOP_P=float(top_p),
            BLOCK=block,
            num_warps=warps_for(block),
            enable_fp_fusion=False,  # guidance is rounded after the product, as elsewhere
        )
    return tokens


def columns_at_once(vocabulary: int) -> int:
    """A power of two; with the largest, 512 threads have four columns each, whose exponentials in float64 still find registers."""
    return min(triton.next_power_of_2(vocabulary), 2048)


def warps_for(block: int) -> int:
    """Four columns a thread: one load of 128 bits in float32."""
    return max(block // 128, 1)


@triton.jit(do_not_specialize=["uniform_stride", "top_k"])
def draw_kernel(
    logits,  # [B or 2B, V]
    uniform,  # float64 [B]
    tokens,  # int64 [B]
    vocabulary,
    uniform_stride,
    scale,
    inverse_temperature,
    top_k,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,  # compiled once for each value: Triton passes floats as float32, and 0.9 is to be the same number everywhere
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    row = logits + image.to(tl.int64) * vocabulary
    null = row + tl.num_programs(0).to(tl.int64) * vocabulary

    peak = tl.full([], float("-inf"), tl.float32)
    first = tl.full([], 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        columns, x = _scores(row, null, start, vocabulary, scale, inverse_temperature, GUIDED, GREEDY, BLOCK)
        block_peak = tl.max(x, 0)
        if GREEDY:
            first = tl.where(block_peak > peak, tl.min(tl.where(x == block_peak, columns, NO_COLUMN), 0), first)
        peak = tl.maximum(peak, block_peak)
    if GREEDY:
        tl.store(tokens + image, first.to(tl.int64))
    else:
        low = tl.full([], LOWEST_KEY, tl.int32)
        if TOP_K:
            # invariant: at least k keys are >= low
            high = _keys(peak)
            while low < high:
                middle = (low | high) - ((low ^ high) >> 1)  # the mean rounded up, which cannot overflow
                counts = tl.zeros([BLOCK], tl.int32)
                for start in range(0, vocabulary, BLOCK):
                    _, x = _scores(row, null, start, vocabulary, scale, inverse_temperature, GUIDED, GREEDY, BLOCK)
                    counts += (_keys(x) >= middle).to(tl.int32)
                count = tl.sum(counts, 0)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count > top_k, high, tl.where(count == top_k, middle, middle - 1))

        peak_wide = peak.to(tl.float64)
        last_tie = tl.full([], 0, tl.int32)  # how many may be before a token among those that equal the border of the nucleus
        if TOP_P < 1:
            total = _mass(row, null, vocabulary, scale, inverse_temperature, peak_wide, low, GUIDED, BLOCK)
            bound = total * tl.full([], TOP_P, tl.float64)
            # invariant: above the key `high` there is no more than `bound`, namely `above`; it ends at the smallest such key
            high = _keys(peak)
            above = tl.full([], 0.0, tl.float64)
            while low < high:
                middle = (low & high) + ((low ^ high) >> 1)  # the mean rounded down
                mass = _mass(row, null, vocabulary, scale, inverse_temperature, peak_wide, middle + 1, GUIDED, BLOCK)
                above = tl.where(mass <= bound, mass, above)
                low = tl.where(mass <= bound, low, middle + 1)
                high = tl.where(mass <= bound, middle, high)
            border = tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.float32, bitcast=True)
            border_weight = tl.maximum(tl.exp(border.to(tl.float64) - peak_wide), 1e-300)
            last_tie = tl.minimum((bound - above) / border_weight, 1e9).to(tl.int32)

        # once for the sum, then for the last block with any weight at which the sum of those before it is no more than the target
        target = tl.full([], 0.0, tl.float64)
        chosen, chosen_before, chosen_ties = 0, target, 0
        for _pass in range(2):
            before = tl.full([], 0.0, tl.float64)
            ties = 0
            for start in range(0, vocabulary, BLOCK):
                _, x = _scores(row, null, start, vocabulary, scale, inverse_temperature, GUIDED, GREEDY, BLOCK)
                weights, ties_after = _weights(x, peak_wide, low, ties, last_tie, TOP_P)
                mass = tl.sum(weights, 0)
                is_reached = (mass > 0) & (before <= target)
                chosen = tl.where(is_reached, start, chosen)
                chosen_before = tl.where(is_reached, before, chosen_before)
                chosen_ties = tl.where(is_reached, ties, chosen_ties)
                before += mass
                ties = ties_after
            target = tl.load(uniform + image * uniform_stride) * before
        columns, x = _scores(row, null, chosen, vocabulary, scale, inverse_temperature, GUIDED, GREEDY, BLOCK)
        weights, _ = _weights(x, peak_wide, low, chosen_ties, last_tie, TOP_P)
        is_beyond = (chosen_before + tl.cumsum(weights, 0) > target) & (weights > 0)
        first = tl.min(tl.where(is_beyond, columns, NO_COLUMN), 0)
        last = tl.max(tl.where(weights > 0, columns, 0), 0)  # where rounding leaves none beyond the target
        tl.store(tokens + image, tl.minimum(first, last).to(tl.int64))


@triton.jit
def _scores(row, null, start, vocabulary, scale, inverse_temperature, GUIDED: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a block and their logits after guidance and temperature, -inf beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK)
    is_real = columns < vocabulary
    x = tl.load(row + columns, mask=is_real, other=float("-inf")).to(tl.float32)
    if GUIDED:
        base = tl.load(null + columns, mask=is_real, other=0.0).to(tl.float32)
        x = base + scale * (x - base)
        x = tl.where(is_real, x, float("-inf"))
    if not GREEDY:
        x = x * inverse_temperature
    return columns, x


@triton.jit
def _keys(x):
    """int32 in the order of float32, with one key for both zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _mass(row, null, vocabulary, scale, inverse_temperature, peak_wide, lowest, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights whose keys are at least `lowest`."""
    masses = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocabulary, BLOCK):
        _, x = _scores(row, null, start, vocabulary, scale, inverse_temperature, GUIDED, False, BLOCK)
        masses += tl.where(_keys(x) >= lowest, tl.exp(x.to(tl.float64) - peak_wide), 0.0)
    return tl.sum(masses, 0)


@triton.jit
def _weights(x, peak_wide, lowest, ties, last_tie, TOP_P: tl.constexpr):
    """Weights of a block, 0 where dropped, and how many up to its end equal the border of the nucleus, of which the first ones are kept."""
    keys = _keys(x)
    is_kept = keys >= lowest
    if TOP_P < 1:
        ties_here = (keys == lowest).to(tl.int32)
        rank = ties + tl.cumsum(ties_here, 0) - ties_here
        is_kept = (keys > lowest) | ((keys == lowest) & (rank <= last_tie))
        ties += tl.sum(ties_here, 0)
    return tl.where(is_kept, tl.exp(x.to(tl.float64) - peak_wide), 0.0), ties
