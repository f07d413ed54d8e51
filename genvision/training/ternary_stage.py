"""The generator stage of a training with ternary weights, see genvision.training.ternary."""

from typing import Any

from torch import nn

from genvision.training.ema import EMA
from genvision.training.generator_stage import GeneratorStage
from genvision.training.ternary import TernaryConfig, set_strength


class TernaryStage(GeneratorStage):
    """A generator stage that moves the weights from floats to ternary ones, as a function of the step alone.

    Args:
        model: with ternary layers.
        ternary: says how fast.
        args, kwargs: of GeneratorStage.
    """

    def __init__(self, model: nn.Module, *args: Any, ternary: TernaryConfig, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.ternary = ternary

    def before_step(self, step: int, averages: EMA) -> None:
        for network in (self.model, averages.network):
            if network is not None:
                set_strength(network, self.ternary.strength(step))
        super().before_step(step, averages)
