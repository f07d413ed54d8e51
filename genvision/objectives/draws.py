"""What an objective draws for a training sample: functions of (seed, position) alone, whatever the process, the part or the batch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genvision.streams import IndexedStreams, Purpose


class TrainingDraws:
    """The random numbers of the samples at some positions of a run.

    Args:
        seed: of the run.
        positions: int64 [B].
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        self.streams, self.device = IndexedStreams(seed, positions.tolist()), positions.device

    def uniform(self, purpose: Purpose) -> Tensor:
        """float64 [B] in [0, 1)."""
        return self.streams.uniform(purpose, 1)[:, 0].to(self.device)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        return self.streams.normal(Purpose.TRAINING_NOISE, shape).to(self.device, non_blocking=True)


def stochastic_round(value: float, seed: int, step: int) -> int:
    """`value` rounded up or down at random, so that its mean over steps is kept; the same on every process."""
    u = float(IndexedStreams(seed, [step]).uniform(Purpose.GUIDED_ROWS, 1))
    return math.floor(value) + int(u < value - math.floor(value))


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Uniform numbers in [0, 1) -> sigmoid(mean + std * normal)."""
    tiny = 2.0**-54
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double().clamp(tiny, 1 - tiny)))
