"""Next-token prediction over code sequences (LlamaGen, arXiv:2406.06525 section 3.2)."""

import math
from typing import Any

from torch import Tensor

from genvision.layers.token_loss import TokenTargets
from genvision.objectives.base import Objective


class NextToken(Objective):
    """Loss of a generator of the LlamaGen kind on a batch of codes and labels."""

    def __init__(self, codebook_size: int) -> None:
        self.baselines = {"loss": math.log(codebook_size)}

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has `codes` [B, ...] int64 and `labels` [B]; returns `loss` (nats a token) and `accuracy`."""
        codes = batch["codes"].flatten(1)
        losses = model(codes[:, :-1], batch["labels"], targets=TokenTargets(codes))
        return {"loss": losses.loss, "accuracy": losses.correct.float().mean()}
