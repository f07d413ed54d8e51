"""Paths from data to noise, and what a flow model's output means on them (SiT, arXiv:2401.08740, sections 2 and 3).

One convention inside: time t runs from 0 (data) to 1 (noise), x_t = alpha(t) x_0 + sigma(t) noise, and the velocity is dx_t / dt, which
points toward the noise. SiT and LightningDiT let time run the other way; `Flow` turns time and sign at the border of such networks.

Shapes: x, clean, noise and outputs [B, c, ...]; t [B], float.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

PathName = Literal["ddpm", "linear", "gvp", "vp"]
"""`ddpm` is the discrete diffusion of genvision.objectives.gaussian; the others are the flows of this module."""
Prediction = Literal["noise", "clean", "velocity", "score"]
TimeInput = Literal["step", "toward_noise", "toward_data"]
"""What a network is told: the step 0 .. 999, or a time that rises from data to noise, or from noise to data."""

VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


class Path(ABC):
    """alpha and sigma, and their derivatives, as functions of t."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor: ...

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        return over(self.alpha(t), clean) * clean + over(self.sigma(t), clean) * noise

    def velocity(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt."""
        return over(self.d_alpha(t), clean) * clean + over(self.d_sigma(t), clean) * noise

    def drift_ratio(self, t: Tensor) -> Tensor:
        """k = sigma sigma' - sigma^2 alpha' / alpha, so that velocity = (alpha' / alpha) x - k score; half of VP's beta."""
        sigma = self.sigma(t)
        return sigma * self.d_sigma(t) - sigma.square() * self.d_alpha(t) / self.alpha(t)


class LinearPath(Path):
    """alpha = 1 - t, sigma = t: rectified flow."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return t.new_full(t.shape, -1.0)

    def d_sigma(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape)


class GVPPath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the variance stays 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return (t * math.pi / 2).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (t * math.pi / 2).sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)


class VPPath(Path):
    """The variance-preserving diffusion with beta rising linearly from 0.1 to 20 (arXiv:2011.13456, appendix C)."""

    def alpha(self, t: Tensor) -> Tensor:
        return (-(VP_BETA_MAX - VP_BETA_MIN) / 4 * t.square() - VP_BETA_MIN / 2 * t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._half_beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._half_beta(t) * self.alpha(t).square() / self.sigma(t)

    def drift_ratio(self, t: Tensor) -> Tensor:
        return self._half_beta(t)

    def _half_beta(self, t: Tensor) -> Tensor:
        return (VP_BETA_MIN + t * (VP_BETA_MAX - VP_BETA_MIN)) / 2


PATHS: dict[str, Path] = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath()}


@dataclass(frozen=True)
class Flow:
    """How a flow model's network is asked, and what its output means, in the convention of this module."""

    path: Path
    prediction: Prediction
    time_input: TimeInput

    @classmethod
    def of(cls, generator: Any) -> "Flow":
        """From the configuration of a generator (`path`, `prediction`, `time_input`)."""
        config = generator.config
        return cls(PATHS[config.path], config.prediction, config.time_input)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told instead of t."""
        return 1 - t if self.time_input == "toward_data" else t

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output that is right."""
        if self.prediction == "noise":
            return noise
        if self.prediction == "clean":
            return clean
        if self.prediction == "score":
            return -noise / over(self.path.sigma(t), noise)
        return self._sign * self.path.velocity(clean, noise, t)

    def velocity(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """dx / dt toward the noise."""
        if self.prediction == "velocity":
            return self._sign * output
        return self.path.velocity(self.clean(x, t, output), self.noise(x, t, output), t)

    def noise(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise in x."""
        if self.prediction == "noise":
            return output
        alpha, sigma = over(self.path.alpha(t), x), over(self.path.sigma(t), x)
        if self.prediction == "score":
            return -sigma * output
        if self.prediction == "clean":
            return (x - alpha * output) / sigma
        d_alpha, d_sigma = over(self.path.d_alpha(t), x), over(self.path.d_sigma(t), x)
        return (alpha * self._sign * output - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)

    def clean(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The data in x."""
        if self.prediction == "clean":
            return output
        alpha, sigma = over(self.path.alpha(t), x), over(self.path.sigma(t), x)
        if self.prediction == "velocity":
            d_alpha, d_sigma = over(self.path.d_alpha(t), x), over(self.path.d_sigma(t), x)
            return (d_sigma * x - sigma * self._sign * output) / (alpha * d_sigma - d_alpha * sigma)
        return (x - sigma * self.noise(x, t, output)) / alpha

    def score(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Gradient of the log density of x_t."""
        return output if self.prediction == "score" else -self.noise(x, t, output) / over(self.path.sigma(t), x)

    def output_of_clean(self, x: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """The output that would mean this clean image."""
        if self.prediction == "clean":
            return clean
        noise = (x - over(self.path.alpha(t), x) * clean) / over(self.path.sigma(t), x)
        return self.target(clean, noise, t)

    @property
    def _sign(self) -> float:
        return -1.0 if self.time_input == "toward_data" else 1.0


def over(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] as [B, 1, ...], to multiply x [B, ...]."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
