"""Inception Score (arXiv:1606.03498): exp of the mean divergence between each image's classes and those of all images of its part.

Papers cut the set into parts in three ways, and the score depends on the way: small parts score lower, and parts that hold few classes far
lower. That is why sets sorted by class get absurd scores from estimators that do not shuffle.

Shapes: N images, K classes.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genvision.errors import UserError

Estimator = Literal["adm", "torch-fidelity", "first-is"]
NUM_SPLITS = 10
ADM_BLOCK = 5000
SHUFFLE_SEED = 2020


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """A score and how it was computed."""

    mean: float
    """Over the parts."""
    std: float
    """Population deviation over the parts: their spread, not a standard error."""
    estimator: Estimator
    num_splits: int
    block_size: int | None
    """Images of a part, where the estimator fixes it; the last part may be smaller."""
    shuffle_seed: int | None


def inception_score(
    logits: np.ndarray | Tensor, estimator: Estimator = "torch-fidelity", *, num_splits: int = NUM_SPLITS, block_size: int = ADM_BLOCK
) -> InceptionScore:
    """The score of a set.

    Args:
        logits: float [N, K], before the softmax, in the order of the images.
        estimator: `adm` cuts contiguous blocks of `block_size` (the last may be smaller and counts as much), float32 softmax;
            `torch-fidelity` shuffles with seed 2020 and cuts `num_splits` equal parts, float64; `first-is` cuts `num_splits` contiguous
            parts, float64.

    Raises:
        UserError: fewer images than parts, or fewer than 2.
    """
    count = len(logits)
    if estimator == "adm":
        bounds = [*range(0, count, block_size), count]
    else:
        bounds = [i * count // num_splits for i in range(num_splits + 1)]
    needed = max(2, len(bounds) - 1)
    if count < needed:
        raise UserError(f"the Inception Score of {len(bounds) - 1} parts needs at least {needed} images, got {count}; give more images")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count) if estimator == "torch-fidelity" else np.arange(count)
    dtype = torch.float32 if estimator == "adm" else torch.float64
    scores = [_score_of_part(logits, order[start:stop], dtype) for start, stop in pairwise(bounds)]
    return InceptionScore(
        mean=float(np.mean(scores)),
        std=float(np.std(scores)),
        estimator=estimator,
        num_splits=len(scores),
        block_size=block_size if estimator == "adm" else None,
        shuffle_seed=SHUFFLE_SEED if estimator == "torch-fidelity" else None,
    )


def _score_of_part(logits: np.ndarray | Tensor, indices: np.ndarray, dtype: torch.dtype) -> float:
    rows = logits[indices] if isinstance(logits, np.ndarray) else logits[torch.from_numpy(indices)]
    log_p = torch.as_tensor(rows).to(dtype).log_softmax(dim=1)
    p = log_p.exp()
    marginal = p.mean(dim=0)
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1)
    return float(divergence.mean().double().exp())
