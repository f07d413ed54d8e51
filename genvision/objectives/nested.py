"""Training the smaller networks within a generator along with it (MaGNeTS, arXiv:2502.00382).

M_p is the network of the first 1 / p of heads and hidden units, M_1 the whole one. A step trains M_1 on labels, all others or one on

    lambda CE(M_p, label) + (1 - lambda) CE(M_p, stop-gradient softmax(M_teacher))

where lambda falls from 1 to 0 over the run. The paper's code is not public: curriculum and terms are those of its follow-up (ELT,
arXiv:2604.09168), the teacher and which networks a step trains are options. What is minimised is the mean, not the sum, over the networks
that a step trains: the shares are the same, but the loss stays in the range of a plain one, so that clipping at a norm means what it meant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.token_loss import TokenLosses
from genvision.streams import IndexedStreams, Purpose

Predict = Callable[[int, Tensor | None, float], TokenLosses]
"""Losses of the nested network M_p, from p, what its teacher's last layer read, and the share of the labels; all keep `hidden`."""


@dataclass(frozen=True, kw_only=True)
class NestedLossConfig:
    """Which nested networks are trained, and by whom."""

    nested: tuple[int, ...] = ()
    """Factors p of the nested networks that are trained besides the whole one, 2, 4, 8 say; empty: none."""
    nested_each: Literal["all", "random"] = "all"
    """A step trains all of them, or one at random, which saves time."""
    teacher: Literal["largest", "next"] = "largest"
    """Whose predictions a nested network learns: the whole network's, or those of the next larger one. They come from a training
    pass, dropout included; a next larger network that a random step does not train costs a pass of its own."""
    distillation: bool = True
    """Go over from labels to the teacher's predictions in the course of the run; false keeps to labels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nested", tuple(self.nested))  # a list, as a saved configuration has it
        if any(factor < 2 for factor in self.nested) or len(set(self.nested)) < len(self.nested):
            raise UserError(
                f"loss.nested must hold different factors of at least 2, got {list(self.nested)}; 1, the whole network, always trains"
            )


class NestedTraining:
    """What each step of a run trains.

    Args:
        seed: of the run; the random choice is one of the step, so that all processes agree.
        num_steps: over which lambda falls.
    """

    def __init__(self, config: NestedLossConfig, *, seed: int, num_steps: int) -> None:
        self.config, self.seed, self.num_steps = config, seed, num_steps
        self.factors = tuple(sorted(config.nested))

    def trained(self, step: int) -> tuple[int, ...]:
        """Factors of the nested networks that this step trains, ascending: large networks first."""
        if self.config.nested_each == "all" or not self.factors:
            return self.factors
        u = float(IndexedStreams(self.seed, [step]).uniform(Purpose.NESTED_WIDTH, 1))
        return (self.factors[int(u * len(self.factors))],)

    def label_share(self, step: int) -> float:
        """lambda."""
        return max(0.0, 1 - step / self.num_steps) if self.config.distillation else 1.0

    def teacher(self, factor: int) -> int:
        """The factor of the network that M_factor learns from."""
        return 1 if self.config.teacher == "largest" else max((1, *(p for p in self.factors if p < factor)))

    def losses(self, step: int, whole: TokenLosses, predict: Predict) -> dict[int, TokenLosses]:
        """Losses by factor; those against labels alone are comparable between networks and over the run.

        Args:
            step: optimiser steps done.
            whole: of the whole network.
        """
        known, factors, share = {1: whole}, self.trained(step), self.label_share(step)
        for factor in factors:
            teacher = None
            if share < 1:
                number = self.teacher(factor)
                if number not in known:
                    with torch.no_grad():
                        known[number] = predict(number, None, 1.0)
                teacher = known[number].hidden
            known[factor] = predict(factor, teacher, share)
        return {factor: known[factor] for factor in factors}
