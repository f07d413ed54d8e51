"""Classifier-free guidance (arXiv:2207.12598) as one object for every family.

The guided prediction is null + s (conditional - null). s = 1 is the conditional model alone, and then the second branch
is not computed.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from genvision.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the condition is amplified, and when."""

    scale: float = 1.0
    """s at full strength; 1 is off, 0 is the unconditional model."""
    schedule: Schedule = "constant"
    """How s comes to `scale` over the steps: constant, or rising from 1 linearly or by half a cosine."""
    start: float = 0.0
    """Part of the steps that passes before guidance begins, in [0, 1]."""
    stop: float = 1.0
    """Part of the steps after which it ends, in [0, 1]."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(f"guidance scale {self.scale} is not allowed; give 1 (off) or more, or down to 0 for the unconditional model")
        if self.schedule not in get_args(Schedule):
            raise UserError(f"guidance schedule '{self.schedule}' is unknown; choose one of {', '.join(get_args(Schedule))}")
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(f"guidance interval {self.start} .. {self.stop} is not allowed; 0 <= start <= stop <= 1 is needed")

    def scale_at(self, step: int, num_steps: int) -> float:
        """s of step 0 .. num_steps - 1; exactly 1 outside the interval."""
        slack = 1e-9  # start and stop are often written as step / num_steps
        if not self.start * num_steps - slack <= step < self.stop * num_steps - slack:
            return 1.0
        progress = step / max(num_steps - 1, 1)
        if self.schedule == "linear":
            return 1.0 + (self.scale - 1.0) * progress
        if self.schedule == "cosine":
            return 1.0 + (self.scale - 1.0) * (1 - math.cos(math.pi * progress)) / 2
        return self.scale

    def scales(self, num_steps: int) -> list[float]:
        return [self.scale_at(step, num_steps) for step in range(num_steps)]


def llamagen_stop(cfg_interval: int, num_tokens: int) -> float:
    """`stop` that means the official LlamaGen `cfg_interval`: c guides the first c + 2 tokens, -1 all of them."""
    return 1.0 if cfg_interval < 0 else min((cfg_interval + 2) / num_tokens, 1.0)


def combine(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """null + scale (conditional - null)."""
    return null + scale * (conditional - null)
