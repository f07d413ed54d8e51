"""The linear probe that MAGE reports (arXiv:2211.09117, section 4.2), on frozen features.

Features are normalised by row (a LayerNorm that stays at the identity) and by channel (a BatchNorm without weights), then a linear layer
is trained by LARS along one cosine: 90 epochs, 10 of them warm-up, batches of 4,096, rate 0.1 for 256 rows (0.05 for ViT-L).

Two things differ from the published protocol. Each image has one feature vector, that of its centre crop; there every epoch sees new
random crops. And the network is at rest (its dropout off); there the dropout of the token embedding stays on.

Shapes: N training rows, M test rows, D features, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.data.order import sample_indices, sample_positions
from genvision.eval.lars import LARS

WARMUP_SHARE = 10 / 90
NORM_EPS = 1e-6
HEAD_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class MageRecipe:
    """What may be changed in it."""

    epochs: int = 90
    batch_size: int = 4096
    """At most; all rows where there are fewer."""
    learning_rate: float = 0.1
    """Peak for 256 rows a batch, scaled with the batch size."""
    seed: int = 0
    """Of the first weights and the order."""

    def num_rows(self, num: int) -> int:
        """Rows that are seen in training on `num` of them: whole batches."""
        batch_size = min(self.batch_size, num)
        return math.ceil(self.epochs * num / batch_size) * batch_size


class MageProbe:
    """Trained when it is made.

    Args:
        features: float [N, D], N at least 2; labels int64 [N] on the same device.
        advance: told how many rows have been seen.

    Attributes:
        loss: mean over the last twentieth of the steps.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        recipe: MageRecipe,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        batch_size = min(recipe.batch_size, len(features))
        num_steps = recipe.num_rows(len(features)) // batch_size
        self.norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=NORM_EPS).to(features.device)
        first = torch.empty(num_classes, features.shape[1])
        nn.init.trunc_normal_(first, std=HEAD_STD, generator=torch.Generator().manual_seed(recipe.seed))
        self.weight = first.to(features.device).requires_grad_()
        self.bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
        peak = recipe.learning_rate * batch_size / 256
        optimizer = LARS([self.weight, self.bias], lr=peak)
        losses = []
        with torch.enable_grad():
            for step in range(num_steps):
                for group in optimizer.param_groups:
                    group["lr"] = peak * cosine_with_warmup(step / num_steps, WARMUP_SHARE)
                rows = torch.from_numpy(sample_indices(recipe.seed, sample_positions(step, batch_size), len(features)))
                rows = rows.to(features.device)
                loss = F.cross_entropy(self._logits(features[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                advance(batch_size)
        self.norm.eval()
        self.weight, self.bias = self.weight.detach(), self.bias.detach()
        self.loss = torch.stack(losses[-max(1, num_steps // 20) :]).mean().item()

    def __call__(self, features: Tensor) -> Tensor:
        """float [M, D] -> int64 [M]"""
        return self._logits(features).argmax(dim=1)

    def _logits(self, features: Tensor) -> Tensor:
        rows = F.layer_norm(features, features.shape[1:], eps=NORM_EPS)
        return F.linear(self.norm(rows), self.weight, self.bias)


def cosine_with_warmup(progress: float, warmup: float) -> float:
    """Share of the peak rate after a part `progress` in [0, 1): a straight rise over the part `warmup`, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
