"""Training with ternary weights by straight-through gradients (BitNet b1.58 Reloaded, arXiv:2407.09527), for any generator and recipe.

The float weights behind the ternary ones are what is trained, averaged and kept in checkpoints, under the names of the plain model. The
finished model is a plain one again, whose weights are the ternary values of the average.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from genvision.errors import UserError
from genvision.layers.ternarize import ternarize_linears
from genvision.layers.ternary import TernaryLinear


@dataclass(frozen=True, kw_only=True)
class TernaryConfig:
    """Weights of -1, 0 and 1 times a scale in the linear layers of all blocks; the rest stays as it is."""

    measure: Literal["none", "mean", "median"] = "none"
    """What of |W| gives the scale: mean (BitNet b1.58) or median (Reloaded); none trains float weights."""
    per_row: bool = False
    """A scale for every output row, instead of one for each matrix."""
    warmup_steps: int = 0
    """Steps in which weights go over from floats to ternary ones, linearly; previews, scores and validation see ternary ones at once."""
    exclude: tuple[str, ...] = ()
    """Layers that stay floats besides, by parts of names (blocks.0) or shell patterns of whole names (blocks.*.mlp.down)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))  # a list, as a saved configuration has it
        if self.warmup_steps < 0:
            raise UserError(f"ternary.warmup_steps must be at least 0, got {self.warmup_steps}")
        if not self.is_on and (self.per_row or self.warmup_steps or self.exclude):
            raise UserError("ternary.measure is none, so the other options of ternary have no meaning; set it to mean, or leave them out")

    @property
    def is_on(self) -> bool:
        return self.measure != "none"

    @property
    def summary(self) -> str:
        """For the model card."""
        return f"{self.measure} of the size of weights, a scale a {'row' if self.per_row else 'matrix'}"

    def strength(self, step: int) -> float:
        """How far weights have gone over when `step` steps are done: 0 .. 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


def make_ternary(model: nn.Module, config: TernaryConfig, loss: Mapping[str, Any]) -> list[str]:
    """Make a model that is to be trained ternary in place; its parameters stay the same, and so do their names.

    Args:
        loss: options of the objective.

    Returns:
        Names of the ternary layers.

    Raises:
        UserError: a layer is named that is not there, or nested networks are trained, which are parts of the float weights.
    """
    assert config.measure != "none"
    if loss.get("nested"):
        raise UserError(f"ternary.measure {config.measure}: nested networks (loss.nested) have no ternary weights; leave one of them out")
    return ternarize_linears(model, measure=config.measure, per_row=config.per_row, exclude=config.exclude, packed=False)


def set_strength(model: nn.Module, strength: float) -> None:
    """How far the weights of a model in training are ternary, see `TernaryLinear`."""
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.strength.fill_(strength)
