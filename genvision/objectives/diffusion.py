"""Training a discrete Gaussian diffusion: DiT (arXiv:2212.09748) with its learned variance, x- and v-prediction, min-SNR weights.

Shapes: codes x_0 and noise [B, c, ...], steps int64 [B].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.denoising import DenoisingLossConfig, DenoisingObjective, Noised
from genvision.objectives.gaussian import NUM_TRAINING_STEPS, GaussianDiffusion, at

PIXEL_BIN = 1 / 255
"""Half a bin of an 8-bit image in [-1, 1]; DiT applies it to latents, too."""


@dataclass(frozen=True, kw_only=True)
class DiffusionLossConfig(DenoisingLossConfig):
    """What the squared error is weighted with and what is added. What is predicted is an option of the model."""

    min_snr_gamma: float | None = None
    """Weigh each step by min(SNR, gamma) / SNR of the noise prediction (arXiv:2303.09556, 5 there); null weighs all steps alike."""
    variance_weight: float = 1.0
    """Weight of the bound that trains a learned variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise UserError(f"loss.min_snr_gamma must be above 0, got {self.min_snr_gamma}; null turns it off")
        if self.variance_weight < 0:
            raise UserError(f"loss.variance_weight must be 0 or more, got {self.variance_weight}")


class DiffusionLoss(DenoisingObjective):
    """Loss of a DiT of the path `ddpm`. Terms: `loss`, `mse`, with a learned variance `variance_bound` (bits a value), and `alignment`."""

    def __init__(self, config: DiffusionLossConfig, generator: Any, *, seed: int, batch_size: int) -> None:
        super().__init__(config, generator, seed=seed, batch_size=batch_size)
        self.config = config
        self.prediction, self.learn_sigma = generator.config.prediction, generator.config.learn_sigma
        self.diffusion = GaussianDiffusion.linear()
        self.baselines = {"mse": 1.0} if self.prediction == "noise" else {}

    def noised(self, codes: Tensor, noise: Tensor, u: Tensor) -> Noised:
        steps = (u * NUM_TRAINING_STEPS).long()
        target = self.diffusion.target(codes, noise, steps, self.prediction)
        time = steps.float()
        return Noised(self.diffusion.mix(codes, noise, steps), target, time, time / NUM_TRAINING_STEPS)

    def terms(self, output: Tensor, codes: Tensor, noised: Noised) -> dict[str, Tensor]:
        losses = self.losses(output, noised.target, codes, noised.x_t, noised.network_time.long())
        return {name: value.mean() for name, value in losses.items()}

    def losses(self, output: Tensor, target: Tensor, codes: Tensor, x_t: Tensor, steps: Tensor) -> dict[str, Tensor]:
        """Terms of each sample, [B] each."""
        prediction = output[:, : codes.shape[1]]
        mse = (prediction - target).square().flatten(1).mean(1)
        losses = {"loss": mse * self._weights(steps), "mse": mse}
        if self.learn_sigma:
            coefficient = output[:, codes.shape[1] :]
            losses["variance_bound"] = self.variance_bound(prediction.detach(), coefficient, codes, x_t, steps)
            losses["loss"] = losses["loss"] + self.config.variance_weight * losses["variance_bound"]
        return losses

    def variance_bound(self, prediction: Tensor, coefficient: Tensor, codes: Tensor, x_t: Tensor, steps: Tensor) -> Tensor:
        """Term of the variational bound at each step, in bits a value [B]; a likelihood at step 0 (arXiv:2102.09672, section 3.1)."""
        diffusion = self.diffusion
        mean = diffusion.posterior_mean(x_t, steps, diffusion.clean(x_t, steps, prediction, self.prediction))
        log_variance = diffusion.learned_log_variance(steps, coefficient)
        true_mean = diffusion.posterior_mean(x_t, steps, codes)
        true_log_variance = at(diffusion.posterior_log_variance, steps, codes)
        difference = (true_mean - mean).square()
        ratio = true_log_variance - log_variance
        divergence = 0.5 * (ratio.exp() - 1 - ratio + difference * (-log_variance).exp())
        likelihood = -discretized_log_likelihood(codes, mean, 0.5 * log_variance)
        first = (steps == 0).reshape(-1, *[1] * (codes.dim() - 1))
        return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def _weights(self, steps: Tensor) -> Tensor:
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones(len(steps), device=steps.device)
        alpha_bars = self.diffusion.alpha_bars.to(steps.device)[steps]
        snr = (alpha_bars / (1 - alpha_bars)).float()
        kept = snr.clamp(max=gamma)
        if self.prediction == "clean":
            return kept
        return kept / (snr + 1) if self.prediction == "velocity" else kept / snr


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of 8-bit values in [-1, 1] under a normal distribution cut into bins, open at both ends, [B, c, ...]."""
    precision = (-log_std).exp()
    above = approximate_normal_cdf(precision * (x - mean + PIXEL_BIN))
    below = approximate_normal_cdf(precision * (x - mean - PIXEL_BIN))
    tiny = 1e-12
    inside = (above - below).clamp(min=tiny).log()
    return torch.where(x < -0.999, above.clamp(min=tiny).log(), torch.where(x > 0.999, (1 - below).clamp(min=tiny).log(), inside))


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Standard normal cumulative distribution by a tanh, as the official code computes it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
