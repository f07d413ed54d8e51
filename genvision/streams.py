"""Random numbers that belong to an index: image i of a job, or sample position i of a training run.

Whatever is drawn for an index depends on (seed, index, purpose, step) alone, so it is the same whatever the batch size, the number of
processes, the order or a resume. The streams are Philox 4x64 (Salmon et al. 2011), keyed by (seed, index); purpose and step stand in the
counter, so that drawing more for one purpose or step moves no other. Only numpy's raw bits are used, which never change between versions.
"""

import math
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from genvision.errors import UserError

MAX_SEED = 2**64 - 1


class Purpose(IntEnum):
    """What a stream is for. Numbers are part of the contract: changing one changes every published sample."""

    LABEL = 0
    TOKEN = 1
    START_NOISE = 2
    """x at the noisiest time, of a diffusion sampler."""
    STEP_NOISE = 3
    """What a stochastic sampler adds at each of its steps."""
    CHOICE = 4
    """Which tokens a masked sampler keeps."""
    ORDER_SHIFT = 5
    """Where a fixed order of tokens begins."""
    TRAINING_TIME = 16
    TRAINING_NOISE = 17
    LABEL_DROPOUT = 18
    POSTERIOR = 19
    """Sample of a variational tokenizer's posterior."""
    GUIDED_ROWS = 20
    """How many rows of a training batch are trained towards a guided target; of a step, not of a position."""
    GUIDANCE_SCALE = 21
    """How strongly a guided row is guided."""
    OTHER_LABEL = 22
    """The label that a guided row is compared with."""
    MASK_RATIO = 23
    """How many tokens of a training sample are masked."""
    MASK = 24
    """Which tokens of a training sample are masked."""
    TOKEN_ORDER = 25
    """The order in which a training sample is read, and whether it is another one than raster."""
    NESTED_WIDTH = 26
    """Which nested network is trained; of a step, not of a position."""


class IndexedStreams:
    """The streams of some indices under one seed.

    Args:
        seed: 0 .. 2^64 - 1.
        indices: their order is the row order of everything drawn.
    """

    def __init__(self, seed: int, indices: Iterable[int]) -> None:
        self.seed, self.indices = seed, [int(index) for index in indices]
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed {seed} is outside 0 .. 2^64 - 1")

    def __len__(self) -> int:
        return len(self.indices)

    def uniform(self, purpose: Purpose, count: int, *, step: int = 0) -> Tensor:
        """`count` numbers an index, uniform on [0, 1): float64 [B, count] on the CPU."""
        return torch.from_numpy((self._raw(purpose, count, step) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, purpose: Purpose, shape: Sequence[int], *, step: int = 0) -> Tensor:
        """Standard normal numbers for each index: float32 [B, *shape] on the CPU.

        Each is the inverse of the cumulative distribution at a uniform number in (0, 1), so |x| stays below 8.3.
        """
        bits = self._raw(purpose, math.prod(shape), step) >> np.uint64(12)
        uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
        return torch.special.ndtri(uniform).float().view(len(self), *shape)

    def _raw(self, purpose: Purpose, count: int, step: int) -> np.ndarray:
        rows = np.empty((len(self), count), dtype=np.uint64)
        for row, index in enumerate(self.indices):
            key = np.array([self.seed, index], dtype=np.uint64)
            rows[row] = np.random.Philox(key=key, counter=np.array([0, 0, step, purpose], dtype=np.uint64)).random_raw(count)
        return rows
