"""Single steps of the flow samplers, from t to an earlier time `after`, both floats in [0, 1] and the same for all images.

Letters: v = dx / dt, D the diffusion coefficient, dt = after - t < 0, xi standard normal. The SDE is dx = (v - D score) dt + sqrt(2 D) dw
(SiT, arXiv:2401.08740, equation 5, where w = 2 D).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from genvision.objectives.paths import Flow
from genvision.samplers.guided_network import GuidedNetwork

Diffusion = Literal["sigma", "linear", "decreasing", "sbdm"]
LastStep = Literal["mean", "tweedie", "euler", "none"]


class Field:
    """Velocity, drift and clean image at (x, t) from one call of the network each."""

    def __init__(self, network: GuidedNetwork, flow: Flow, diffusion: str) -> None:
        self._network, self._flow, self._diffusion = network, flow, diffusion
        self._begin = torch.zeros(0)

    def begin(self, t: float) -> None:
        """A step begins: its guidance is that of time t."""
        self._begin = torch.tensor([t], dtype=torch.float64)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        return self._flow.velocity(x, _on(t, x), self._output(x, t))

    def drift(self, x: Tensor, t: float) -> Tensor:
        """v - D score."""
        output, time = self._output(x, t), _on(t, x)
        return self._flow.velocity(x, time, output) - self.coefficient(t) * self._flow.score(x, time, output)

    def clean(self, x: Tensor, t: float) -> Tensor:
        return self._flow.clean(x, _on(t, x), self._output(x, t))

    def coefficient(self, t: float) -> float:
        """D."""
        if self._diffusion == "linear":
            return t
        if self._diffusion == "decreasing":
            return 0.25 * (1 - math.cos(math.pi * t)) ** 2
        time = torch.tensor(t, dtype=torch.float64)
        return float(self._flow.path.sigma(time) if self._diffusion == "sigma" else self._flow.path.drift_ratio(time))

    def _output(self, x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.float64)
        return self._network(x, times, guided_at=self._begin.expand(len(x)))


Noise = Callable[[], Tensor]


def euler(field: Field, x: Tensor, t: float, after: float, noise: Noise) -> Tensor:
    return x + (after - t) * field.velocity(x, t)


def heun(field: Field, x: Tensor, t: float, after: float, noise: Noise) -> Tensor:
    """The explicit trapezoid rule."""
    first = field.velocity(x, t)
    second = field.velocity(x + (after - t) * first, after)
    return x + (after - t) / 2 * (first + second)


def midpoint(field: Field, x: Tensor, t: float, after: float, noise: Noise) -> Tensor:
    half = x + (after - t) / 2 * field.velocity(x, t)
    return x + (after - t) * field.velocity(half, (t + after) / 2)


def euler_maruyama(field: Field, x: Tensor, t: float, after: float, noise: Noise) -> Tensor:
    return x + (after - t) * field.drift(x, t) + math.sqrt(2 * field.coefficient(t) * (t - after)) * noise()


def stochastic_heun(field: Field, x: Tensor, t: float, after: float, noise: Noise) -> Tensor:
    """The noise first, then the trapezoid rule."""
    x = x + math.sqrt(2 * field.coefficient(t) * (t - after)) * noise()
    first = field.drift(x, t)
    second = field.drift(x + (after - t) * first, after)
    return x + (after - t) / 2 * (first + second)


STEPS: dict[str, Callable[[Field, Tensor, float, float, Noise], Tensor]] = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "euler-maruyama": euler_maruyama,
    "stochastic-heun": stochastic_heun,
}

LAST_STEPS: dict[str, Callable[[Field, Tensor, float, float], Tensor]] = {
    "mean": lambda field, x, t, after: x + (after - t) * field.drift(x, t),
    "tweedie": lambda field, x, t, after: field.clean(x, t),
    "euler": lambda field, x, t, after: x + (after - t) * field.velocity(x, t),
}


def _on(t: float, x: Tensor) -> Tensor:
    """[1], which broadcasts over all images."""
    return x.new_tensor([t])
