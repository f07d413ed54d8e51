"""Randomness that belongs to the image: image `index` of a job draws from streams made of (seed, index) alone.

So the same image comes out whatever the batch size, the number of processes, the order or a resume. The streams are
Philox 4x64 (Salmon et al. 2011), keyed by (seed, index); the purpose stands in the counter's last word, so that drawing
more for one purpose moves no other.
"""

from collections.abc import Iterable
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


class ImageStreams:
    """The streams of some images of one job.

    Args:
        seed: of the job, 0 .. 2^64 - 1.
        indices: which images; their order is the row order of everything drawn.
    """

    def __init__(self, seed: int, indices: Iterable[int]) -> None:
        self.seed, self.indices = seed, list(indices)
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed {seed} is outside 0 .. 2^64 - 1")

    def __len__(self) -> int:
        return len(self.indices)

    def uniform(self, purpose: Purpose, count: int) -> Tensor:
        """`count` numbers an image, uniform on [0, 1): float64 [B, count] on the CPU."""
        rows = [_bits(self.seed, index, purpose).random_raw(count) for index in self.indices]
        raw = np.asarray(rows, dtype=np.uint64).reshape(len(rows), count)
        return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _bits(seed: int, index: int, purpose: Purpose) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, purpose], dtype=np.uint64))


def draw_labels(seed: int, indices: Iterable[int], classes: list[int]) -> Tensor:
    """A label for each image, uniform over `classes`, from the image's own stream: int64 [B]."""
    u = ImageStreams(seed, indices).uniform(Purpose.LABEL, 1)[:, 0]
    return torch.tensor(classes)[(u * len(classes)).long()]
