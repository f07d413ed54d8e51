"""What this machine cannot do faster, measured by turns with what is timed: bytes read once, and matrix products.

A job that must read B bytes and do F floating-point operations takes at least the longer of B / (read rate) and F / (product rate). The
fraction of that floor shows a slow peer that makes us look fast. Rates are the best of the run: what the machine has shown that it can do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genvision.bench.timing import Seconds

READ, PRODUCT = "bytes read once", "matrix products"
BUFFER = 2**28
"""Bytes that are read to measure the rate: more than caches hold."""
SIDE = 2048
"""Of the square matrices whose product is the rate of products."""


@dataclass(frozen=True)
class Work:
    """What a job cannot do without."""

    flops: float
    bytes: float = 0.0


class Floors:
    """Peers for `by_turns` (with `floors=list(calls)`), and the floor that follows from their times.

    Args:
        work: the largest that will be asked for; smaller ones are measured with smaller buffers.
    """

    def __init__(self, work: Work) -> None:
        self.bytes = min(BUFFER, max(4, int(work.bytes)))
        self.side = max(16, min(SIDE, int((work.flops / 16) ** (1 / 3))))  # at most an eighth of the work, where that is small
        left, right = torch.randn(2, self.side, self.side).unbind()
        self.calls: dict[str, Callable[[], Tensor]] = {PRODUCT: lambda: left @ right}
        if work.bytes:
            buffer = torch.ones(self.bytes // 4)
            self.calls[READ] = lambda: buffer.sum()

    def floor(self, seconds: Seconds, work: Work) -> tuple[str, float]:
        """Which of both is longer, and its CPU seconds."""
        times = {PRODUCT: min(seconds.cpu[PRODUCT]) * work.flops / (2 * self.side**3)}
        if work.bytes:
            times[READ] = min(seconds.cpu[READ]) * work.bytes / self.bytes
        return max(times.items(), key=lambda item: item[1])


def counted_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions in a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not count those of fused attention on a CPU
        call()
    return float(counter.get_total_flops())
