"""Classifier-free guidance (arXiv:2207.12598) as one object for every family.

The guided prediction is base + s (conditional - base); the base is the null class, or a weaker model (autoguidance, arXiv:2406.02507).
s = 1 is the conditional model alone, and then the second branch is not computed. Outside an interval s is 1 (arXiv:2404.07724).

Progress p runs from 0 (noise, the first token) to 1 (data, the last one).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genvision.errors import UserError

Schedule = Literal["constant", "linear", "cosine", "power-cosine"]
Method = Literal["cfg", "apg"]
SLACK = 1e-9
"""Of the ends of an interval: start and stop are often written as step / num_steps."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the condition is amplified, when, where, and how."""

    scale: float = 1.0
    """s at full strength; 1 is off, 0 is the unconditional model."""
    schedule: Schedule = "constant"
    """How s comes to `scale` over the steps: constant, or rising from 1 linearly, by half a cosine, or by one of progress^power."""
    start: float = 0.0
    """Progress at which guidance begins, in [0, 1]."""
    stop: float = 1.0
    """Progress after which it ends, in [0, 1]."""
    channels: int | None = None
    """Only the first of them are guided; None is all. The published figures of DiT, SiT and LightningDiT guide 3."""
    power: float = 1.0
    """Of `power-cosine`, s = 1 + (scale - 1)(1 - cos(pi p^power)) / 2 (RAR, arXiv:2411.00776; MDT, arXiv:2303.14389)."""
    method: Method = "cfg"
    """`cfg` is the formula above; `apg` changes the difference first (genvision.samplers.projected_guidance)."""
    apg_eta: float = 0.0
    """Part that is left of the difference along the prediction; 1 with the next two off is `cfg`."""
    apg_norm: float | None = None
    """r, the largest norm of the difference of one image; None is no limit."""
    apg_momentum: float = 0.0
    """beta of the differences' running sum, in (-1, 1); negative pushes away from earlier ones, as the paper does."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(f"guidance scale {self.scale} is not allowed; give 1 (off) or more, or down to 0 for the unconditional model")
        if self.schedule not in get_args(Schedule):
            raise UserError(f"guidance schedule '{self.schedule}' is unknown; choose one of {', '.join(get_args(Schedule))}")
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(f"guidance interval {self.start} .. {self.stop} is not allowed; 0 <= start <= stop <= 1 is needed")
        if self.channels is not None and self.channels < 1:
            raise UserError(f"guidance channels {self.channels} is not allowed; give the number of channels to guide, or none for all")
        if not self.power > 0:
            raise UserError(f"guidance power {self.power} is not allowed; give a number above 0, 1 is the plain cosine")
        if self.method not in get_args(Method):
            raise UserError(f"guidance method '{self.method}' is unknown; choose one of {', '.join(get_args(Method))}")
        if not math.isfinite(self.apg_eta):
            raise UserError(f"apg_eta {self.apg_eta} is not allowed; give a number, usually in 0 .. 1")
        if self.apg_norm is not None and not self.apg_norm > 0:
            raise UserError(f"apg_norm {self.apg_norm} is not allowed; give a norm above 0, or none for no limit")
        if not -1 < self.apg_momentum < 1:
            raise UserError(f"apg_momentum {self.apg_momentum} is not allowed; it must lie between -1 and 1")

    def scale_at(self, step: int, num_steps: int) -> float:
        """s of token 0 .. num_steps - 1; exactly 1 outside the interval, whose end is not included."""
        return self.scales(num_steps)[step]

    def scales(self, num_steps: int) -> list[float]:
        """s of each token, or of each step of a masked sampler; `power-cosine` never comes to the full scale, as published."""
        steps = torch.arange(num_steps, dtype=torch.float64)
        inside = (steps >= self.start * num_steps - SLACK) & (steps < self.stop * num_steps - SLACK)
        last = num_steps if self.schedule == "power-cosine" else max(num_steps - 1, 1)
        scales: list[float] = self._scheduled(steps / last, inside).tolist()
        return scales

    def scale_over(self, progress: Tensor) -> Tensor:
        """s at each progress, for samplers with a time; exactly 1 outside the interval, both ends of which are included.

        Times of others as progress: LightningDiT's `cfg_interval_start` is `start`; [low, high] of REPA, whose time is 0 at the data,
        is start = 1 - high, stop = 1 - low; step i of DDPM has progress 1 - i / 999.

        Args:
            progress: float64, any shape.

        Returns:
            float64, the same shape.
        """
        return self._scheduled(progress, (progress >= self.start - SLACK) & (progress <= self.stop + SLACK))

    def _scheduled(self, progress: Tensor, inside: Tensor) -> Tensor:
        scales = torch.full_like(progress, self.scale)
        if self.schedule == "linear":
            scales = 1 + (self.scale - 1) * progress
        elif self.schedule in ("cosine", "power-cosine"):
            power = self.power if self.schedule == "power-cosine" else 1.0
            scales = 1 + (self.scale - 1) * (1 - torch.cos(math.pi * progress**power)) / 2
        return torch.where(inside, scales, 1.0)


def llamagen_stop(cfg_interval: int, num_tokens: int) -> float:
    """`stop` that means the official LlamaGen `cfg_interval`: c guides the first c + 2 tokens, -1 all of them."""
    return 1.0 if cfg_interval < 0 else min((cfg_interval + 2) / num_tokens, 1.0)


def combine(conditional: Tensor, base: Tensor, scale: float | Tensor) -> Tensor:
    """base + scale (conditional - base)."""
    return base + scale * (conditional - base)
