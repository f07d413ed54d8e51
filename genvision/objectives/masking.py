"""Which tokens of a training image are masked, and which are not even read: laws, and draws that belong to the sample.

A law gives the part r of the N tokens that is masked. MaskGIT (arXiv:2202.04200, section 3.1) draws a progress u ~ U(0, 1) for each sample
and takes r from a schedule; Halton-MaskGIT (arXiv:2503.17076) then masks each token with probability r; MAGE (arXiv:2211.09117) draws one r
for the whole batch from a normal distribution cut at `min_ratio` and 1, and leaves a fixed part of all tokens, masked ones, unread.

Shapes: B samples, N tokens, M masked tokens, P tokens that are not dropped.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.mask_schedules import check_schedule, masked_fraction
from genvision.streams import IndexedStreams, Purpose

TRUNCATED_NORMAL = "truncated_normal"


class Masks(NamedTuple):
    """What a network is shown of some samples."""

    masked: Tensor
    """Boolean [B, N]."""
    where: Tensor | None
    """int64 [B, M], the masked tokens in ascending order; None where samples may differ in their number."""
    kept: Tensor | None
    """int64 [B, P], the tokens that are not dropped in ascending order; None where none is dropped."""


@dataclass(frozen=True, kw_only=True)
class MaskLaw:
    """How many tokens are masked, and which."""

    mask_law: str = "cosine"
    """Part of the tokens that is masked: a schedule (cosine, arccos, linear, square, root, pow<X>, exp, log) at a uniform progress of each
    sample, or truncated_normal: one part for all samples of a step (MAGE)."""
    min_ratio: float = 0.0
    """Smallest part: a schedule's smaller ones are raised to it (0.5 in MaskGIT's code); a truncated normal begins there (0.5 in MAGE)."""
    independent: bool = False
    """Mask each token by itself with that probability (Halton-MaskGIT) instead of an exact number of tokens, at least one."""
    ratio_mean: float = 0.55
    """Of the normal distribution before it is truncated."""
    ratio_std: float = 0.25
    """Of the normal distribution before it is truncated."""
    drop_ratio: float = 0.0
    """Part of the tokens, masked ones, that the encoder is not shown at all; for mage, 0.5 there. 0 shows all."""

    def __post_init__(self) -> None:
        if self.mask_law != TRUNCATED_NORMAL:
            try:
                check_schedule(self.mask_law)
            except UserError as error:
                raise UserError(f"loss.mask_law: {error}, or {TRUNCATED_NORMAL}") from error
        if not 0 <= self.min_ratio < 1:
            raise UserError(f"loss.min_ratio must be at least 0 and below 1, got {self.min_ratio}")
        if not 0 <= self.ratio_mean <= 1:
            raise UserError(f"loss.ratio_mean must lie in [0, 1], got {self.ratio_mean}")
        if not self.ratio_std > 0:
            raise UserError(f"loss.ratio_std must be above 0, got {self.ratio_std}")
        if not 0 <= self.drop_ratio <= self.min_ratio:
            raise UserError(
                f"loss.drop_ratio must lie between 0 and loss.min_ratio {self.min_ratio}, since only masked tokens are dropped, "
                f"got {self.drop_ratio}; lower it or raise loss.min_ratio"
            )
        if self.drop_ratio and self.independent:
            raise UserError(
                "loss.independent masks any number of tokens, of which loss.drop_ratio cannot drop a fixed part; set one of them only"
            )

    def draw(self, seed: int, positions: Tensor, num_tokens: int, *, step: int = 0, views: int = 1) -> Masks:
        """Masks of samples, functions of (seed, position) alone, and of (seed, step) where the ratio is that of a step; on the CPU.

        Args:
            positions: int64 [B], in the run.
            step: optimiser steps done.
            views: masks of each sample, independent of each other; rows are all samples of the first view, then those of the next.
        """
        streams = IndexedStreams(seed, positions.tolist())
        noise = torch.cat([streams.uniform(Purpose.MASK, num_tokens, step=view) for view in range(views)])
        if self.mask_law == TRUNCATED_NORMAL:
            # a draw of the step, so that all processes and all parts of a batch agree
            u = IndexedStreams(seed, [step]).uniform(Purpose.MASK_RATIO, 1)[:, 0].expand(len(noise))
        else:
            u = torch.cat([streams.uniform(Purpose.MASK_RATIO, 1, step=view)[:, 0] for view in range(views)])
        ratios = self.ratios(u, num_tokens)
        if self.independent:
            return Masks(noise < ratios[:, None], None, None)
        return masks_of(noise, self.counts(ratios, num_tokens), self.num_dropped(num_tokens), equal=self.mask_law == TRUNCATED_NORMAL)

    def ratios(self, u: Tensor, num_tokens: int) -> Tensor:
        """Uniform numbers in [0, 1), float64 of any shape, to the parts that are masked, of the same shape."""
        if self.mask_law == TRUNCATED_NORMAL:
            return truncated_normal(u, self.ratio_mean, self.ratio_std, self.min_ratio, 1.0)
        return masked_fraction(self.mask_law, u, num_tokens).clamp(min=self.min_ratio)

    def counts(self, ratios: Tensor, num_tokens: int) -> Tensor:
        """How many tokens are masked: int64, at least 1 and at least as many as are dropped."""
        exact = num_tokens * ratios
        # MAGE rounds up, 1d-tokenizer's MaskGIT to the nearest
        counts = exact.ceil() if self.mask_law == TRUNCATED_NORMAL else exact.round()
        return counts.long().clamp(min=max(1, self.num_dropped(num_tokens)))

    def num_dropped(self, num_tokens: int) -> int:
        return math.ceil(num_tokens * self.drop_ratio)


def masks_of(noise: Tensor, counts: Tensor, num_dropped: int, *, equal: bool) -> Masks:
    """The tokens of the smallest noise values are masked, those of the very smallest are dropped as well.

    Args:
        noise: [B, N].
        counts: int64 [B], tokens to mask.
        num_dropped: at most the smallest count.
        equal: whether all counts are the same by law, so that there is a table of masked tokens.
    """
    order = noise.argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(noise.shape[1]).expand_as(order))
    masked = rank < counts[:, None]
    where = columns(masked) if equal else None
    return Masks(masked, where, columns(rank >= num_dropped) if num_dropped else None)


def columns(chosen: Tensor) -> Tensor:
    """Boolean [B, N] with equally many true values in each row -> their columns, int64 [B, M], ascending."""
    return chosen.nonzero()[:, 1].view(len(chosen), -1)


def truncated_normal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """Quantiles u, float64 in [0, 1], of a normal distribution that is cut at `low` and `high`."""
    below, above = (torch.special.ndtr(torch.tensor((end - mean) / std, dtype=torch.float64)) for end in (low, high))
    return (mean + std * torch.special.ndtri(below + u * (above - below))).clamp(low, high)
