"""Gaussian diffusion in discrete steps (DDPM, arXiv:2006.11239; learned variance of arXiv:2102.09672; DiT, arXiv:2212.09748).

Letters: steps i = 0 .. N - 1 from clean to noisy, beta_i, alpha-bar_i = prod (1 - beta), x_i = sqrt(ab_i) x_0 + sqrt(1 - ab_i) noise.
Tables are float64 and cast when they meet a tensor.

Shapes: x, clean, noise [B, c, ...]; steps int64 [B].
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genvision.errors import UserError

NUM_TRAINING_STEPS = 1000
Spacing = Literal["even", "ddim", "leading"]
"""`even` includes both ends, as in improved diffusion; `ddim` begins at 0 with a whole stride; `leading` is that of diffusers' DDIM."""


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """Tables of one noise schedule, whole or respaced."""

    betas: Tensor
    """float64 [N]."""
    network_steps: Tensor
    """int64 [N]: which of the 1,000 training steps each step is; what the network is told."""

    @classmethod
    def linear(cls) -> "GaussianDiffusion":
        """The schedule of DDPM and DiT: beta from 1e-4 to 0.02 in 1,000 steps."""
        return cls(torch.from_numpy(np.linspace(1e-4, 0.02, NUM_TRAINING_STEPS)), torch.arange(NUM_TRAINING_STEPS))

    def respaced(self, num_steps: int, spacing: Spacing = "even") -> "GaussianDiffusion":
        """The same diffusion on fewer steps: beta'_i = 1 - ab_i / ab_(i - 1) on those kept (arXiv:2102.09672, section 4)."""
        kept = kept_steps(num_steps, len(self.betas), spacing)
        alpha_bars = self.alpha_bars[kept]
        before = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        return GaussianDiffusion(1 - alpha_bars / before, self.network_steps[kept])

    @cached_property
    def alpha_bars(self) -> Tensor:
        return torch.cumprod(1 - self.betas, 0)

    @cached_property
    def alpha_bars_before(self) -> Tensor:
        """alpha-bar of the next cleaner step, 1 for the cleanest."""
        return torch.cat([self.betas.new_ones(1), self.alpha_bars[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """beta-tilde: variance of x_(i-1) given x_i and x_0; 0 for the cleanest step."""
        return self.betas * (1 - self.alpha_bars_before) / (1 - self.alpha_bars)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm, where the cleanest step has that of the next."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2], variance[1:]]).log() if len(variance) > 1 else self.betas.log()

    @cached_property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """Of x_0 and of x_i in the mean of x_(i-1)."""
        before, after = self.alpha_bars_before, self.alpha_bars
        return self.betas * before.sqrt() / (1 - after), (1 - before) * (1 - self.betas).sqrt() / (1 - after)

    def mix(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_i."""
        return at(self.alpha_bars.sqrt(), steps, clean) * clean + at((1 - self.alpha_bars).sqrt(), steps, clean) * noise

    def clean(self, x: Tensor, steps: Tensor, output: Tensor, prediction: str) -> Tensor:
        """x_0 as a network's output says, of whatever it predicts (`velocity` is v of arXiv:2202.00512)."""
        if prediction == "clean":
            return output
        if prediction == "velocity":
            return at(self.alpha_bars.sqrt(), steps, x) * x - at((1 - self.alpha_bars).sqrt(), steps, x) * output
        return at((1 / self.alpha_bars).sqrt(), steps, x) * x - at((1 / self.alpha_bars - 1).sqrt(), steps, x) * output

    def noise(self, x: Tensor, steps: Tensor, clean: Tensor) -> Tensor:
        """The noise in x, if this is its clean image."""
        return (at((1 / self.alpha_bars).sqrt(), steps, x) * x - clean) / at((1 / self.alpha_bars - 1).sqrt(), steps, x)

    def target(self, clean: Tensor, noise: Tensor, steps: Tensor, prediction: str) -> Tensor:
        """The output that is right."""
        if prediction == "clean":
            return clean
        if prediction == "velocity":
            return at(self.alpha_bars.sqrt(), steps, clean) * noise - at((1 - self.alpha_bars).sqrt(), steps, clean) * clean
        return noise

    def posterior_mean(self, x: Tensor, steps: Tensor, clean: Tensor) -> Tensor:
        """Mean of x_(i-1) given x_i and x_0."""
        of_clean, of_x = self.posterior_coefficients
        return at(of_clean, steps, x) * clean + at(of_x, steps, x) * x

    def learned_log_variance(self, steps: Tensor, coefficient: Tensor) -> Tensor:
        """Between those of beta-tilde (-1) and beta (1), not clamped (arXiv:2102.09672, equation 15)."""
        part = (coefficient + 1) / 2
        return part * at(self.betas.log(), steps, coefficient) + (1 - part) * at(self.posterior_log_variance, steps, coefficient)


def kept_steps(num_steps: int, of: int, spacing: Spacing) -> Tensor:
    """The steps that are left of `of`, rising, int64 [num_steps].

    Raises:
        UserError: there are not so many.
    """
    if not 1 <= num_steps <= of:
        raise UserError(f"num_steps {num_steps} is not possible; the model knows {of} steps, so give 1 .. {of}")
    if spacing == "even":
        stride = (of - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        places = np.cumsum([0.0] + [stride] * (num_steps - 1))  # added up, as the official code does; it decides ties
        return torch.from_numpy(np.round(places).astype(np.int64))
    if spacing == "leading":
        return torch.arange(num_steps) * (of // num_steps)
    strides = [stride for stride in range(1, of) if len(range(0, of, stride)) == num_steps]
    if not strides:
        raise UserError(f"spacing ddim has no whole stride that gives {num_steps} of {of} steps; take even, or another number")
    return torch.arange(0, of, strides[0])


def at(table: Tensor, steps: Tensor, x: Tensor) -> Tensor:
    """Entries of a table for each row of x, [B, 1, ...], in its type."""
    return table.to(x.device)[steps].to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
