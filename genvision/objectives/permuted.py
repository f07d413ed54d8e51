"""Next-token prediction in random orders that give way to raster order (RAR, arXiv:2411.00776, sections 3.2 and 3.3).

Shapes: B images, N tokens of an image, K codebook entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.token_loss import TokenTargets
from genvision.objectives.base import Network, Objective
from genvision.objectives.draws import TrainingDraws
from genvision.streams import Purpose


@dataclass(frozen=True, kw_only=True)
class PermutedLossConfig:
    """How long tokens are read in random orders; the defaults are the published ones, for 250,000 steps."""

    anneal_start: int = 125000
    """Steps in which every sample is read in a random order."""
    anneal_end: int = 187500
    """Steps after which every sample is read in raster order; between the two their share falls linearly. 0 is raster throughout."""

    def __post_init__(self) -> None:
        if self.anneal_start < 0:
            raise UserError(f"loss.anneal_start must be 0 or more, got {self.anneal_start}")
        if self.anneal_end < self.anneal_start:
            raise UserError(f"loss.anneal_end must be at least anneal_start {self.anneal_start}, got {self.anneal_end}; set both")

    def random_share(self, step: int) -> float:
        """Probability of a random order after `step` steps."""
        if step >= self.anneal_end:
            return 0.0
        return min(1.0, (self.anneal_end - step) / (self.anneal_end - self.anneal_start)) if step > self.anneal_start else 1.0


class PermutedTokens(Objective):
    """Loss of a RAR on a batch of codes and labels. Terms: `loss` (nats a token), `accuracy`, `random_order` (share of the samples).

    Args:
        generator: says how often labels are dropped.
        seed: of the run; orders and dropped labels depend on it and on the position of the sample.
    """

    def __init__(self, config: PermutedLossConfig, generator: Any, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self.label_dropout = generator.config.class_dropout
        self.baselines = {"loss": math.log(generator.config.codebook_size)}
        self.random_share = config.random_share(0)
        self.validation_step = config.anneal_end

    def begin_step(self, step: int, averaged: Network | None) -> None:
        self.random_share = self.config.random_share(step)

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Objective`; codes are int64."""
        codes = batch["codes"].flatten(1)
        draws = TrainingDraws(self.seed, batch["positions"])
        orders, is_random = token_orders(draws, codes.shape[1], self.random_share)
        drop = draws.uniform(Purpose.LABEL_DROPOUT) < self.label_dropout
        losses = model(codes, batch["labels"], orders=orders, drop=drop, targets=TokenTargets(codes.gather(1, orders)))
        return {"loss": losses.loss, "accuracy": losses.correct.float().mean(), "random_order": is_random.float().mean()}


def token_orders(draws: TrainingDraws, num_tokens: int, random_share: float) -> tuple[Tensor, Tensor]:
    """A random order with probability `random_share`, raster otherwise: int64 [B, N], and which ones are random, boolean [B]."""
    is_random = draws.uniform(Purpose.TOKEN_ORDER) < random_share
    raster = torch.arange(num_tokens, device=draws.device).expand(len(is_random), -1)
    if random_share == 0:
        return raster, is_random
    noise = draws.streams.uniform(Purpose.TOKEN_ORDER, num_tokens, step=1).to(draws.device)
    return torch.where(is_random.unsqueeze(1), noise.argsort(dim=1, stable=True), raster), is_random
