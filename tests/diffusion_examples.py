"""Noise that is given, and a generator whose data are known: a Gaussian for each class, so that the right output is a formula."""

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from genvision.objectives.gaussian import GaussianDiffusion
from genvision.objectives.paths import Flow
from genvision.streams import Purpose


class GivenNoise:
    """In place of ImageStreams: x at the noisiest time [B, ...], and the noise of each step [steps, B, ...]."""

    def __init__(self, start: Tensor, steps: Tensor | None = None) -> None:
        self.start, self.steps = start, steps

    def __len__(self) -> int:
        return len(self.start)

    def normal(self, purpose: Purpose, shape: tuple[int, ...], *, step: int = 0) -> Tensor:
        assert tuple(shape) == tuple(self.start.shape[1:])
        if purpose == Purpose.START_NOISE:
            return self.start
        assert self.steps is not None
        return self.steps[step]


class GaussianGenerator:
    """A float64 network without weights: class k draws from N(means[k], covariance), the null class from N(0, 4 covariance).

    With learn_sigma its variance coefficients are all 1: the larger of the two variances, which is right in the limit of many steps.
    """

    dtype, device = torch.float64, torch.device("cpu")
    num_classes, null_label, has_null_label, code_shape = 2, 2, True, (3, 1, 1)
    means = torch.tensor([[1.5, -1.0, 0.5], [-0.7, 0.2, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    root = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 0.4]], dtype=torch.float64)
    covariance = root @ root.T
    spread, axes = torch.linalg.eigh(covariance)

    def __init__(self, path: str, prediction: str, time_input: str, *, learn_sigma: bool = False, most_rows: int | None = None) -> None:
        self.config = FrozenDict(path=path, prediction=prediction, time_input=time_input, scale_conditioned=False)
        self.learn_sigma, self.most_rows = learn_sigma, most_rows
        self.rows: list[int] = []
        """Of each call."""

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, *, scale: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        if self.most_rows is not None and len(x) > self.most_rows:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} rows")
        t = t[:1] if bool((t == t[0]).all()) else t  # one row stands for all
        labels = labels[:1] if bool((labels == labels[0]).all()) else labels
        config, diffusion = self.config, GaussianDiffusion.linear()
        if config.path == "ddpm":
            bars = diffusion.alpha_bars[t.long()]
            alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
        else:
            flow = Flow.of(self)
            time = flow.network_time(t)  # the same in both directions
            alpha, sigma = flow.path.alpha(time), flow.path.sigma(time)
        alpha, sigma = alpha[:, None], sigma[:, None]
        spread = self.spread * torch.where(labels == self.null_label, 4.0, 1.0)[:, None]
        mean = self.means[labels]
        apart = (x.flatten(1) - alpha * mean) @ self.axes / (alpha**2 * spread + sigma**2)
        clean = (mean + (alpha * spread * apart) @ self.axes.T).view(x.shape)
        noise = (sigma * apart @ self.axes.T).view(x.shape)
        if config.path != "ddpm":
            return flow.target(clean, noise, time)
        output = diffusion.target(clean, noise, t.long(), config.prediction)
        return torch.cat([output, torch.ones_like(output)], dim=1) if self.learn_sigma else output
