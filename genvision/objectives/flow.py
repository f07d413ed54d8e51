"""Flow matching: SiT (arXiv:2401.08740), LightningDiT (arXiv:2501.01423), REPA (arXiv:2410.06940).

t is 0 at the data and 1 at the noise.

Shapes: codes x_0 and noise [B, c, ...], t [B].
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.denoising import DenoisingLossConfig, DenoisingObjective, Noised
from genvision.objectives.draws import logit_normal
from genvision.objectives.paths import Flow


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig(DenoisingLossConfig):
    """Which times are trained, and what is added to the squared error. What is predicted, and on which path, are options of the model."""

    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times; logit_normal: sigmoid of a normal number, more of the middle."""
    time_mean: float = 0.0
    """Of that normal number; above 0 means more noise."""
    time_std: float = 1.0
    """Of that normal number."""
    time_shift: float = 1.0
    """s of t' = s t / (1 + (s - 1) t): above 1 moves times to the noise, as large latents need it (SD3, arXiv:2403.03206, section 5.3)."""
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    """Of noise and score predictions: as the velocity's error, or as the likelihood's bound (SiT, section 2.4)."""
    direction_weight: float = 0.0
    """Weight of 1 - cosine between predicted and true velocity over the channels; LightningDiT has 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time_std", "time_shift"):
            if not getattr(self, name) > 0:
                raise UserError(f"loss.{name} must be above 0, got {getattr(self, name)}")
        if self.direction_weight < 0:
            raise UserError(f"loss.direction_weight must be 0 or more, got {self.direction_weight}")

    def times(self, u: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> training times float32 [B] within the interval."""
        t = u if self.time_sampling == "uniform" else logit_normal(u, self.time_mean, self.time_std)
        t = self.time_shift * t / (1 + (self.time_shift - 1) * t)
        low, high = interval
        return (low + (high - low) * t).float()


class FlowMatching(DenoisingObjective):
    """Loss of a DiT whose path is not `ddpm`. Terms: `loss`, `mse` and, where they are on, `direction` and `alignment`."""

    def __init__(self, config: FlowLossConfig, generator: Any, *, seed: int, batch_size: int) -> None:
        super().__init__(config, generator, seed=seed, batch_size=batch_size)
        self.config, self.flow = config, Flow.of(generator)
        if config.weighting != "none" and self.flow.prediction not in ("noise", "score"):
            raise UserError(f"loss.weighting {config.weighting} is for noise and score predictions, not for {self.flow.prediction}")
        self.interval = training_interval(self.flow, generator.config.path)
        self.baselines = {}  # what guessing scores depends on the variance of the data

    def noised(self, codes: Tensor, noise: Tensor, u: Tensor) -> Noised:
        t = self.config.times(u, self.interval)
        return Noised(self.flow.path.mix(codes, noise, t), self.flow.target(codes, noise, t), self.flow.network_time(t), t)

    def terms(self, output: Tensor, codes: Tensor, noised: Noised) -> dict[str, Tensor]:
        error = self.losses(output, noised.target, noised.t).mean()
        terms = {"loss": error, "mse": error}
        if self.config.direction_weight:
            terms["direction"] = (1 - F.cosine_similarity(output, noised.target, dim=1)).mean()
            terms["loss"] = error + self.config.direction_weight * terms["direction"]
        return terms

    def losses(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted squared error of each sample, [B]."""
        sigma = self.flow.path.sigma(t)
        error = output - target
        if self.flow.prediction == "score":
            error = error * sigma.reshape(-1, *[1] * (error.dim() - 1))  # (sigma score + noise)^2
        losses = error.square().flatten(1).mean(1)
        if self.config.weighting == "none":
            return losses
        k = self.flow.path.drift_ratio(t)
        return losses * ((k / sigma).square() if self.config.weighting == "velocity" else k / sigma.square())


def training_interval(flow: Flow, path: str) -> tuple[float, float]:
    """Times that are trained (SiT, appendix): the ends are cut where the target or its weight would be infinite."""
    if path == "vp":
        return 1e-5, 1.0
    return (0.0, 1.0) if flow.prediction in ("velocity", "clean") else (1e-3, 1 - 1e-3)
