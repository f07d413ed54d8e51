"""Flow matching: SiT (arXiv:2401.08740), LightningDiT (arXiv:2501.01423), REPA (arXiv:2410.06940).

t is 0 at the data and 1 at the noise.

Shapes: codes x_0 and noise [B, c, ...], t [B].
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.base import Network, Objective
from genvision.objectives.draws import TrainingDraws, logit_normal
from genvision.objectives.model_guidance import ModelGuidance, ModelGuidanceConfig
from genvision.objectives.paths import Flow
from genvision.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig:
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
    align_weight: float = 0.5
    """Weight of REPA's alignment with frozen features, where the model has projectors."""
    guidance: ModelGuidanceConfig = field(default_factory=ModelGuidanceConfig)
    """Model-guidance."""

    def __post_init__(self) -> None:
        if isinstance(self.guidance, dict):  # as a saved configuration has it
            object.__setattr__(self, "guidance", ModelGuidanceConfig(**self.guidance))
        for name in ("time_std", "time_shift"):
            if not getattr(self, name) > 0:
                raise UserError(f"loss.{name} must be above 0, got {getattr(self, name)}")
        for name in ("direction_weight", "align_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} must be 0 or more, got {getattr(self, name)}")

    def times(self, u: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Uniform numbers [B] in [0, 1) -> training times float32 [B] within the interval."""
        t = u if self.time_sampling == "uniform" else logit_normal(u, self.time_mean, self.time_std)
        t = self.time_shift * t / (1 + (self.time_shift - 1) * t)
        low, high = interval
        return (low + (high - low) * t).float()


class FlowMatching(Objective):
    """Loss of a flow model.

    Args:
        generator: a DiT whose path is not `ddpm`.
        seed: of the run; noise, times and dropped labels depend on it and on the position of the sample.
        batch_size: over all processes and parts.
    """

    def __init__(self, config: FlowLossConfig, generator: Any, *, seed: int, batch_size: int) -> None:
        self.config, self.seed, self.flow = config, seed, Flow.of(generator)
        if config.weighting != "none" and self.flow.prediction not in ("noise", "score"):
            raise UserError(f"loss.weighting {config.weighting} is for noise and score predictions, not for {self.flow.prediction}")
        self.interval = training_interval(self.flow, generator.config.path)
        self.label_dropout = generator.config.class_dropout
        self.aligned = bool(generator.config.align_depth)
        self.guidance = make_guidance(config.guidance, generator, seed=seed, batch_size=batch_size)
        self.needs_average = self.guidance is not None
        self.baselines = {}  # what guessing scores depends on the variance of the data

    def begin_step(self, step: int, averaged: Network | None) -> None:
        if self.guidance is not None:
            self.guidance.begin_step(step, averaged)

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective`. Terms: `loss`, `mse` and, where they are on, `direction` and `alignment`."""
        draws = TrainingDraws(self.seed, batch["positions"])
        codes, labels = batch["codes"].float(), batch["labels"]
        t = self.config.times(draws.uniform(Purpose.TRAINING_TIME), self.interval)
        noise = draws.noise(codes.shape[1:])
        x_t, target = self.flow.path.mix(codes, noise, t), self.flow.target(codes, noise, t)
        time = self.flow.network_time(t)
        told: dict[str, Tensor] = {}
        if self.guidance is None:
            told["drop"] = draws.uniform(Purpose.LABEL_DROPOUT) < self.label_dropout
        else:
            rows = self.guidance.rows(batch["positions"], t, draws)
            target = target + self.guidance.correction(x_t, time, labels, rows, draws)
            told["drop"] = rows.dropped
            if self.guidance.scale_conditioned:
                told["scale"] = rows.told_scale
        if self.aligned:
            output, projected = model(x_t, time, labels, **told, with_features=True)
        else:
            output = model(x_t, time, labels, **told)
        with torch.autocast(codes.device.type, enabled=False):
            terms = self._terms(output.float(), target, t)
            if self.aligned:
                features = features_of(batch)
                terms["alignment"] = torch.stack([alignment_loss(z.float(), features) for z in projected]).mean()
                terms["loss"] = terms["loss"] + self.config.align_weight * terms["alignment"]
        return terms

    def _terms(self, output: Tensor, target: Tensor, t: Tensor) -> dict[str, Tensor]:
        error = self.losses(output, target, t).mean()
        terms = {"loss": error, "mse": error}
        if self.config.direction_weight:
            terms["direction"] = (1 - F.cosine_similarity(output, target, dim=1)).mean()
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


def make_guidance(config: ModelGuidanceConfig, generator: Any, *, seed: int, batch_size: int) -> ModelGuidance | None:
    """None where it is off.

    Raises:
        UserError: the generator has no null class, or a scale range is asked of one that is not told the scale.
    """
    if not config.is_on:
        return None
    if not generator.has_null_label:
        raise UserError("loss.guidance needs a null class, but model.class_dropout is 0; raise it, or set loss.guidance.scale to 1")
    scale_conditioned = generator.config.scale_conditioned
    if (config.scale_max is not None) != scale_conditioned:
        raise UserError("loss.guidance.scale_max and model.scale_conditioned go together; set both or neither")
    null_label = generator.null_label
    return ModelGuidance(config, batch_size=batch_size, seed=seed, scale_conditioned=scale_conditioned, null_label=null_label)


def features_of(batch: dict[str, Tensor]) -> Tensor:
    """The frozen network's features [B, N, Z] of a batch."""
    if "features" not in batch:
        raise UserError("model.align_depth needs features of a frozen network; encode the data with --features, or set align_depth to 0")
    return batch["features"]


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine between projected hidden states and frozen features, both [B, N, Z] (REPA, equation 8)."""
    if projected.shape != features.shape:
        raise UserError(
            f"features have shape {list(features.shape[1:])}, the model's projections {list(projected.shape[1:])} (tokens, channels); "
            "set model.align_dims to the features' channels, and encode with as many tokens as the model has"
        )
    return -F.cosine_similarity(projected, features, dim=-1).mean()
