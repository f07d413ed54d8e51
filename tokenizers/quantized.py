"""What every quantiser answers to: vectors -> codes -> vectors, with a gradient and losses in training.

Shapes: z [..., D] vectors, K codes, codes [...] int64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genvision.errors import UserError

_CHUNK_FLOATS = 2**27
"""Scores (vectors times codes) held at once: 512 MB."""
_CHUNK_FLOATS_CPU = 2**20
"""On a CPU, where scores had better stay in the cache: 4096 vectors and 16384 codes of 8 channels took one thread 0.19 s, not 0.86."""


@dataclass(frozen=True)
class Quantized:
    """Result of one quantisation in training."""

    quantized: Tensor
    """[..., D] float32, the codes' vectors; a gradient reaches z through them."""
    codes: Tensor
    """[...] int64."""
    losses: dict[str, Tensor]
    """Scalars, each already weighted: `codebook`, `commitment`, `entropy` and the like; empty where there are none."""


class Quantizer(nn.Module, ABC):
    """Vectors [..., D] to whole numbers and back. Everything that chooses a code is float32, under autocast too."""

    codebook_size: int
    codebook_dim: int
    """Channels of the vectors it takes and gives."""
    movable: ClassVar[bool] = False
    """Whether single codes can be moved: `move`."""

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantise [..., D] for training."""

    @abstractmethod
    def nearest(self, z: Tensor) -> Tensor:
        """Codes of vectors: [..., D] -> [...] int64; without a gradient, in bounded memory."""

    @abstractmethod
    def look_up(self, codes: Tensor) -> Tensor:
        """Vectors of codes: [...] int64 -> [..., D]."""

    def move(self, codes: Tensor, vectors: Tensor) -> None:
        """Put single codes elsewhere: [n] int64 distinct, to [n, D].

        Raises:
            UserError: the codes of this quantiser cannot be moved one by one.
        """
        raise UserError(f"the codes of {type(self).__name__} cannot be moved one by one; switch the revival of dead codes off")

    __call__: Callable[..., Any]


def in_chunks(search: Callable[[Tensor], Tensor], z: Tensor, codebook_size: int) -> Tensor:
    """`search` over rows of z [..., D], each giving its code from K scores: [...] int64, at a bounded number of scores at once."""
    # a compiler would unroll many small chunks
    small = z.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, (_CHUNK_FLOATS_CPU if small else _CHUNK_FLOATS) // codebook_size)
    return torch.cat([search(part) for part in z.reshape(-1, z.shape[-1]).split(rows)]).view(z.shape[:-1])


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError where `value` is none of `choices`."""
    if value not in choices:
        raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(choices)}")
