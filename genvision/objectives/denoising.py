"""What diffusion and flow objectives share: noise for each sample, dropped labels, guided targets, and REPA's alignment.

Shapes: codes x_0 and noise [B, c, ...], t [B]; 0 is data, 1 is noise.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.base import Network, Objective
from genvision.objectives.draws import TrainingDraws
from genvision.objectives.model_guidance import ModelGuidance, ModelGuidanceConfig
from genvision.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class DenoisingLossConfig:
    """What both objectives have beside their error."""

    align_weight: float = 0.5
    """Weight of REPA's alignment with frozen features, where the model has projectors."""
    guidance: ModelGuidanceConfig = field(default_factory=ModelGuidanceConfig)
    """Model-guidance."""

    def __post_init__(self) -> None:
        if isinstance(self.guidance, dict):  # as a saved configuration has it
            object.__setattr__(self, "guidance", ModelGuidanceConfig(**self.guidance))
        if self.align_weight < 0:
            raise UserError(f"loss.align_weight must be 0 or more, got {self.align_weight}")


class Noised(NamedTuple):
    """Samples with noise in them."""

    x_t: Tensor
    target: Tensor
    """The output that is right, before guidance."""
    network_time: Tensor
    """[B], what the network is told."""
    t: Tensor
    """[B] in [0, 1]."""


class DenoisingObjective(Objective):
    """Loss of a DiT on noisy codes. A subclass says how noise gets in, and what an error costs.

    Args:
        seed: of the run; noise, times and dropped labels depend on it and on the position of the sample.
        batch_size: over all processes and parts.
    """

    def __init__(self, config: DenoisingLossConfig, generator: Any, *, seed: int, batch_size: int) -> None:
        self.seed, self.align_weight = seed, config.align_weight
        self.label_dropout, self.aligned = generator.config.class_dropout, bool(generator.config.align_depth)
        self.guidance = make_guidance(config.guidance, generator, seed=seed, batch_size=batch_size)
        self.needs_average = self.guidance is not None

    @abstractmethod
    def noised(self, codes: Tensor, noise: Tensor, u: Tensor) -> Noised:
        """Samples at the times that uniform numbers u, float64 [B] in [0, 1), stand for."""

    @abstractmethod
    def terms(self, output: Tensor, codes: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Named terms, means over the batch; `loss` is what is minimised."""

    def begin_step(self, step: int, averaged: Network | None) -> None:
        if self.guidance is not None:
            self.guidance.begin_step(step, averaged)

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective`; beside the subclass's terms there is `alignment` where the model has projectors."""
        positions, labels, codes = batch["positions"], batch["labels"], batch["codes"].float()
        draws = TrainingDraws(self.seed, positions)
        noised = self.noised(codes, draws.noise(codes.shape[1:]), draws.uniform(Purpose.TRAINING_TIME))
        told: dict[str, Tensor] = {}
        if self.guidance is None:
            told["drop"] = draws.uniform(Purpose.LABEL_DROPOUT) < self.label_dropout
        else:
            rows = self.guidance.rows(positions, noised.t, draws)
            correction = self.guidance.correction(noised.x_t, noised.network_time, labels, rows, draws)
            noised = noised._replace(target=noised.target + correction[:, : codes.shape[1]])  # a learned variance is not guided
            told["drop"] = rows.dropped
            if self.guidance.scale_conditioned:
                told["scale"] = rows.told_scale
        output = model(noised.x_t, noised.network_time, labels, **told, with_features=self.aligned)
        output, projected = output if self.aligned else (output, [])
        with torch.autocast(codes.device.type, enabled=False):
            terms = self.terms(output.float(), codes, noised)
            if self.aligned:
                features = features_of(batch)
                terms["alignment"] = torch.stack([alignment_loss(z.float(), features) for z in projected]).mean()
                terms["loss"] = terms["loss"] + self.align_weight * terms["alignment"]
        return terms


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
