"""Next-token prediction over code sequences (LlamaGen, arXiv:2406.06525 section 3.2)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.objectives.base import Objective


def next_token_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats.

    Args:
        logits: [B, N, V].
        targets: int64 [B, N].
        valid: [B], 0 leaves a sample out of the mean.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    if valid is None:
        return losses.mean()
    weights = valid.to(losses).unsqueeze(1).expand_as(losses)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


class NextToken(Objective):
    """Loss of a generator of the LlamaGen kind on a batch of codes and labels."""

    def __init__(self, codebook_size: int) -> None:
        self.baselines = {"loss": math.log(codebook_size)}

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`batch` has `codes` [B, ...] int64 and `labels` [B]; returns `loss` (nats a token) and `accuracy`."""
        targets = batch["codes"].flatten(1)
        logits = model(targets[:, :-1], batch["labels"])
        accuracy = (logits.detach().argmax(-1) == targets).float().mean()
        return {"loss": next_token_loss(logits, targets), "accuracy": torch.as_tensor(accuracy)}
