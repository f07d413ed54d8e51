"""Model-guidance: train towards the guided prediction, so that sampling needs no second branch (arXiv:2502.12154).

The target of a guided row is target + w (averaged(c) - averaged(null)), equations 18 and 20; w = scale - 1. The paper's tables call the
scale w. A warm-up without guidance, and no guidance on the noisiest quarter of the time, are in the authors' code, not in the paper.

Rows of a global batch of B, as in the authors' code: the first are guided, the next have their label dropped (what the online network
sees; the guiding pair always reads the true label and the null one), and the rest are plain.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.base import Network
from genvision.objectives.draws import TrainingDraws, stochastic_round
from genvision.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class ModelGuidanceConfig:
    """Guidance inside the training target."""

    scale: float = 1.0
    """Guidance scale, w of the paper's tables; 1 is off, published models have 1.45."""
    scale_max: float | None = None
    """Scale-conditioned models: each guided row draws its scale between `scale` and this one."""
    start_step: int = 100_000
    """Steps before guidance begins, when the average has learnt to tell classes apart."""
    max_time: float = 0.75
    """Rows noisier than this time are not guided; 1 guides all."""
    drop_rate: float = 0.1
    """Part of the rows whose label is dropped, in place of the model's own class_dropout."""
    guided_rate: float | None = None
    """Part of the rows that are guided; null: all that are not dropped. Scale-conditioned models need plain rows, too: 0.2 in the
    authors' code."""
    base: Literal["null", "other_label"] = "null"
    """What the guiding pair is compared with: no label, or another one drawn at random."""
    auto_every: int = 0
    """Steps after which samples are scored and the scale is moved, from 1 upwards while they get worse and back while they get better,
    `scale` being the largest (section 3.3 of the paper, which names no constants); 0 keeps `scale`."""
    auto_rate: float = 0.1
    """Part of the way that the scale moves each time."""
    auto_num: int = 1000
    """Samples that are scored each time."""
    auto_reference: str | None = None
    """Real images for their FID: folder:PATH, parquet:GLOB, digits, or a file of statistics; the training images unless told."""
    auto_extractor: str = "inception"
    """Features of that FID; digits for digits."""
    auto_weights: str | None = None
    """Local file of the extractor's weights, where it is inception."""

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= (self.scale_max or self.scale):
            raise UserError(f"loss.guidance.scale {self.scale} must be at least 1 (off), and scale_max {self.scale_max} not below it")
        if not (0 <= self.drop_rate <= 1 and 0 <= (self.guided_rate or 0) <= 1 - self.drop_rate):
            raise UserError(
                f"loss.guidance.drop_rate {self.drop_rate} and guided_rate {self.guided_rate} are parts of a batch; "
                "their sum must be 1 at most"
            )
        if not 0 < self.max_time <= 1 or self.start_step < 0:
            raise UserError(f"loss.guidance.max_time {self.max_time} must lie in (0, 1], and start_step {self.start_step} be 0 or more")

        if self.auto_every < 0 or self.auto_num < 2 or not 0 < self.auto_rate <= 1:
            raise UserError(
                f"loss.guidance.auto_every {self.auto_every} must be 0 or more, auto_num {self.auto_num} at least 2, "
                f"and auto_rate {self.auto_rate} lie in (0, 1]"
            )
        if self.auto_every and self.scale_max is not None:
            raise UserError("loss.guidance.auto_every finds one scale, and scale_max asks for a range; leave one of them out")

    @property
    def is_on(self) -> bool:
        return (self.scale_max or self.scale) > 1


class Rows(NamedTuple):
    """How each row of a batch is trained."""

    dropped: Tensor
    """Boolean [B]: the label is replaced by the null one."""
    weight: Tensor
    """float32 [B], w; 0 for plain and dropped rows and where the time is too noisy."""
    told_scale: Tensor
    """float32 [B], what a scale-conditioned network is told: the scale of guided rows, 1 of plain and 0 of dropped ones."""


class ModelGuidance:
    """Chooses the rows and makes the guided targets.

    Args:
        batch_size: B, over all processes and parts.
        scale_conditioned: the network is told the scale.
    """

    def __init__(self, config: ModelGuidanceConfig, *, batch_size: int, seed: int, scale_conditioned: bool, null_label: int) -> None:
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.scale_conditioned, self.null_label = scale_conditioned, null_label
        self.averaged: Network | None = None
        self.num_dropped = self.num_guided = 0
        self.scale = 1.0 if config.auto_every else config.scale
        self.last_fid = float("inf")

    def begin_step(self, step: int, averaged: Network | None) -> None:
        """See `Objective.begin_step`; how many rows are dropped and guided is settled here."""
        config, self.averaged = self.config, averaged
        self.num_dropped = stochastic_round(config.drop_rate * self.batch_size, self.seed, 2 * step)
        self.num_guided = 0
        if step >= config.start_step:
            self.num_guided = self.batch_size - self.num_dropped
            if config.guided_rate is not None:
                self.num_guided = stochastic_round(config.guided_rate * self.batch_size, self.seed, 2 * step + 1)

    def rows(self, positions: Tensor, t: Tensor, draws: TrainingDraws) -> Rows:
        """How the rows at these positions of the run, at these times [B] (1 is noise), are trained."""
        place = positions % self.batch_size
        guided = place < self.num_guided
        dropped = ~guided & (place < self.num_guided + self.num_dropped)
        scale = torch.full_like(t, self.scale)
        if self.config.scale_max is not None:
            scale += (self.config.scale_max - self.config.scale) * draws.uniform(Purpose.GUIDANCE_SCALE).to(t)
        weight = torch.where(guided & (t < self.config.max_time), scale - 1, 0.0)
        return Rows(dropped, weight, torch.where(guided, scale, 1.0).masked_fill(dropped, 0.0))

    def adapt(self, fid: float) -> None:
        """Move the scale by the score of samples that were drawn now, lower being better."""
        wanted = self.config.scale if fid > self.last_fid else 1.0
        self.scale += self.config.auto_rate * (wanted - self.scale)
        self.last_fid = fid

    @torch.no_grad()
    def correction(self, x_t: Tensor, network_time: Tensor, labels: Tensor, rows: Rows, draws: TrainingDraws) -> Tensor:
        """w (averaged(c) - averaged(null)) [B, channels, ...], zero where a row is not guided; only guided rows are evaluated."""
        chosen = rows.weight.nonzero().squeeze(1)
        if len(chosen) == 0:
            return torch.zeros_like(x_t)
        assert self.averaged is not None
        x, t, y = x_t[chosen], network_time[chosen], labels[chosen]
        base = torch.full_like(y, self.null_label)
        if self.config.base == "other_label":
            u = draws.uniform(Purpose.OTHER_LABEL)[chosen]
            base = (y + 1 + (u * (self.null_label - 1)).long()) % self.null_label
        keep = torch.zeros_like(y, dtype=torch.bool)
        told = {}
        if self.scale_conditioned:
            told = {"scale": torch.cat([torch.ones_like(t), torch.zeros_like(t)])}
        pair = self.averaged(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, base]), drop=torch.cat([keep, keep]), **told)
        conditional, null = pair.float().chunk(2)
        weight = rows.weight[chosen].reshape(-1, *[1] * (x.dim() - 1))
        full = conditional.new_zeros(len(labels), *conditional.shape[1:])
        full[chosen] = weight * (conditional - null)
        return full
