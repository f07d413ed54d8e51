"""Training a discrete Gaussian diffusion: DiT (arXiv:2212.09748) with its learned variance, x- and v-prediction, min-SNR weights.

Shapes: codes x_0 and noise [B, c, ...], steps int64 [B].
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.base import Network, Objective
from genvision.objectives.draws import TrainingDraws
from genvision.objectives.flow import alignment_loss, features_of, make_guidance
from genvision.objectives.gaussian import NUM_TRAINING_STEPS, GaussianDiffusion, at
from genvision.objectives.model_guidance import ModelGuidanceConfig
from genvision.streams import Purpose

PIXEL_BIN = 1 / 255
"""Half a bin of an 8-bit image in [-1, 1]; DiT applies it to latents, too."""


@dataclass(frozen=True, kw_only=True)
class DiffusionLossConfig:
    """What the squared error is weighted with and what is added. What is predicted is an option of the model."""

    min_snr_gamma: float | None = None
    """Weigh each step by min(SNR, gamma) / SNR of the noise prediction (arXiv:2303.09556, 5 there); null weighs all steps alike."""
    variance_weight: float = 1.0
    """Weight of the bound that trains a learned variance."""
    align_weight: float = 0.5
    """Weight of REPA's alignment with frozen features, where the model has projectors."""
    guidance: ModelGuidanceConfig = field(default_factory=ModelGuidanceConfig)
    """Model-guidance."""

    def __post_init__(self) -> None:
        if isinstance(self.guidance, dict):  # as a saved configuration has it
            object.__setattr__(self, "guidance", ModelGuidanceConfig(**self.guidance))
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise UserError(f"loss.min_snr_gamma must be above 0, got {self.min_snr_gamma}; null turns it off")
        for name in ("variance_weight", "align_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} must be 0 or more, got {getattr(self, name)}")


class DiffusionLoss(Objective):
    """Loss of a model of the path `ddpm`.

    Args:
        generator: a DiT.
        seed: of the run; noise, steps and dropped labels depend on it and on the position of the sample.
        batch_size: over all processes and parts.
    """

    def __init__(self, config: DiffusionLossConfig, generator: Any, *, seed: int, batch_size: int) -> None:
        self.config, self.seed = config, seed
        self.prediction, self.learn_sigma = generator.config.prediction, generator.config.learn_sigma
        self.diffusion = GaussianDiffusion.linear()
        self.label_dropout = generator.config.class_dropout
        self.aligned = bool(generator.config.align_depth)
        self.guidance = make_guidance(config.guidance, generator, seed=seed, batch_size=batch_size)
        self.needs_average = self.guidance is not None
        self.baselines = {"mse": 1.0}

    def begin_step(self, step: int, averaged: Network | None) -> None:
        if self.guidance is not None:
            self.guidance.begin_step(step, averaged)

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective`. Terms: `loss`, `mse`, with a learned variance `variance_bound` (bits a value), and `alignment`."""
        draws = TrainingDraws(self.seed, batch["positions"])
        codes, labels = batch["codes"].float(), batch["labels"]
        steps = (draws.uniform(Purpose.TRAINING_TIME) * NUM_TRAINING_STEPS).long()
        noise = draws.noise(codes.shape[1:])
        x_t, target = self.diffusion.mix(codes, noise, steps), self.diffusion.target(codes, noise, steps, self.prediction)
        time = steps.float()
        told: dict[str, Tensor] = {}
        if self.guidance is None:
            told["drop"] = draws.uniform(Purpose.LABEL_DROPOUT) < self.label_dropout
        else:
            rows = self.guidance.rows(batch["positions"], time / NUM_TRAINING_STEPS, draws)
            correction = self.guidance.correction(x_t, time, labels, rows, draws)
            target = target + (correction[:, : codes.shape[1]] if correction.dim() else correction)  # the variance is not guided
            told["drop"] = rows.dropped
            if self.guidance.scale_conditioned:
                told["scale"] = rows.told_scale
        if self.aligned:
            output, projected = model(x_t, time, labels, **told, with_features=True)
        else:
            output = model(x_t, time, labels, **told)
        with torch.autocast(codes.device.type, enabled=False):
            losses = self.losses(output.float(), target, codes, x_t, steps)
            terms = {name: value.mean() for name, value in losses.items()}
            if self.aligned:
                terms["alignment"] = torch.stack([alignment_loss(z.float(), features_of(batch)) for z in projected]).mean()
                terms["loss"] = terms["loss"] + self.config.align_weight * terms["alignment"]
        return terms

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
