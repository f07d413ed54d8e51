"""What every objective answers to: the loss of a generator on a batch of codes and labels."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from genvision.objectives.model_guidance import ModelGuidance

Network = Callable[..., Any]
"""A generator, or one with other weights, called like it."""


class Objective:
    """`loss = objective(model, batch)["loss"]`; a generator does not know its objective."""

    baselines: dict[str, float]
    """Values to read terms against, the `loss` of guessing, say."""
    needs_average = False
    """`begin_step` must be given a network with the averaged weights."""

    validation_step = 0
    """The step whose draws validation uses, so that they never change."""

    def begin_step(self, step: int, averaged: Network | None) -> None:
        """Called before every optimiser step.

        Args:
            step: steps done so far.
            averaged: calls the generator with the first moving average of its weights, without gradients; None where none is kept.
        """

    guidance: "ModelGuidance | None" = None
    """Where the target is a guided one; its scale may move with the score of samples."""

    def __call__(self, model: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named terms; `loss` is what is minimised.

        Args:
            batch: `codes` [B, ...], `labels` int64 [B], `positions` int64 [B]: the number of each sample in the run, on which
                everything random depends; `features` [B, N, Z] where a frozen network's are there.
        """
        raise NotImplementedError
