"""A model of masked tokens with its guidance, as a masked sampler asks it step by step; keys and values may stay from one to the next.

Shapes: B images, N tokens, M of them masked, K codebook entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genvision.layers.nested import TokenCache
from genvision.samplers.guidance import combine


@dataclass(frozen=True)
class Step:
    """What one step of a job does, the same for all of its images."""

    progress: float
    """After the step, in (0, 1]."""
    num_masked: int
    """Before it."""
    num_revealed: int
    scale: float
    """Of guidance."""
    nesting: int
    is_full: bool
    """All tokens go through the network; otherwise those that are masked or were revealed in the step before."""
    num_read: int


class MaskedNetwork:
    """Guided logits; conditional and null rows share one batch.

    Args:
        generator: a `MaskedGenerator` in eval mode.
        labels: int64 [B].
        keeps: keys and values, for steps that do not read all tokens.
    """

    def __init__(self, generator: Any, labels: Tensor, *, keeps: bool) -> None:
        self.generator, self.labels, self.keeps = generator, labels, keeps
        self.both = torch.cat([labels, labels])
        self.drop = torch.arange(len(self.both), device=labels.device) >= len(labels)
        self.cache: TokenCache | None = None

    def __call__(self, codes: Tensor, where: Tensor, step: Step, fresh: Tensor | None) -> Tensor:
        """float32 [B, M, K].

        Args:
            codes: int64 [B, N], the generator's `mask_id` where unknown.
            where: int64 [B, M], the tokens that are asked for.
            fresh: int64 [B, Q], the tokens that are read; None where the step reads all.
        """
        if step.is_full:
            self.cache = TokenCache() if self.keeps else None
        options: dict[str, Any] = {"nesting": step.nesting, "cache": self.cache}
        if step.scale == 1:
            return self.generator(codes, self.labels, where=where, fresh=fresh, **options)
        doubled = [torch.cat([x, x]) if x is not None else None for x in (codes, where, fresh)]
        logits = self.generator(doubled[0], self.both, drop=self.drop, where=doubled[1], fresh=doubled[2], **options)
        conditional, null = logits.chunk(2)
        return combine(conditional, null, step.scale)
