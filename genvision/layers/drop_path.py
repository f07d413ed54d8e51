"""Stochastic depth for networks whose blocks do not have it (arXiv:1603.09382).

Shapes: B rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def stochastic_depth(blocks: Sequence[nn.Module], rate: float) -> Iterator[None]:
    """Within it, blocks in training mode are left out for some rows: with probability 0 the first, rising in a line to `rate` of the last.

    A block is left out as a whole, its attention and its feed-forward branch together; where it stays, what it adds is scaled up, so that
    the mean is the same. The draws are torch's own, as those of dropout.

    Args:
        blocks: what a block gives has the shape [B, ...] of the first thing that it is given, and is that plus something.
        rate: in [0, 1).
    """
    assert 0 <= rate < 1, rate
    thinned = [(block, rate * i / max(len(blocks) - 1, 1)) for i, block in enumerate(blocks) if rate * i > 0]
    for block, own in thinned:
        # not a hook, which whoever calls `forward` itself would pass by
        block.forward = partial(_run, block, block.forward, own)
    try:
        yield
    finally:
        for block, _ in thinned:
            del block.forward


def _run(block: nn.Module, forward: Callable[..., Tensor], rate: float, x: Tensor, *args: Any, **options: Any) -> Tensor:
    output = forward(x, *args, **options)
    if not block.training:
        return output
    keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x + (output - x) * (keep / (1 - rate)).to(output.dtype)
