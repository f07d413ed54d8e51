"""Each sampler against data whose score is a formula: a Gaussian comes out with its mean and covariance within 2 %."""

import pytest
import torch
from diffusion_examples import GaussianGenerator, GivenNoise

from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.flow import FlowSampler
from genvision.streams import Purpose

NUM = 20_000


class FreshNoise(GivenNoise):
    """That of steps is drawn when it is asked for."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(NUM, 3, 1, 1, generator=self.random))

    def normal(self, purpose, shape, *, step=0):
        return self.start if purpose == Purpose.START_NOISE else torch.randn(NUM, *shape, generator=self.random)


def error(generator, sampler):
    """The larger one of those of mean and covariance, in parts of their own size (Euclidean, Frobenius)."""
    x = sampler.sample(generator, torch.ones(NUM, dtype=torch.int64), FreshNoise()).double().flatten(1)
    mean, right = x.mean(0), generator.means[1]
    of_covariance = (torch.cov(x.T) - generator.covariance).norm() / generator.covariance.norm()
    return max(float((mean - right).norm() / right.norm()), float(of_covariance))


@pytest.mark.parametrize(
    ("options", "prediction"),
    [
        ({"method": "ddpm", "num_steps": 1000}, "noise"),
        ({"method": "ddim", "num_steps": 500}, "clean"),
        ({"method": "ddim", "num_steps": 1000, "eta": 1.0}, "velocity"),
        ({"method": "dpm++", "num_steps": 100}, "noise"),
        ({"method": "dpm++", "num_steps": 100}, "velocity"),
    ],
)
def test_diffusion_samplers_draw_the_data(options, prediction):
    assert error(GaussianGenerator("ddpm", prediction, "step"), DiffusionSampler(**options)) < 0.02


def test_ddpm_with_a_learned_variance_draws_the_data():
    generator = GaussianGenerator("ddpm", "noise", "step", learn_sigma=True)
    assert error(generator, DiffusionSampler(num_steps=1000)) < 0.02


METHODS = {
    "euler": {"num_steps": 300},
    "heun": {"num_steps": 40},
    "midpoint": {"num_steps": 40},
    "dopri5": {},
    "euler-maruyama": {"num_steps": 300, "last_step_size": 0.01},
    "stochastic-heun": {"num_steps": 200, "last_step_size": 0.01},
}


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_flow_samplers_draw_the_data(method, path):
    sampler = FlowSampler(method=method, **METHODS[method])
    assert error(GaussianGenerator(path, "velocity", "toward_noise"), sampler) < 0.02


@pytest.mark.parametrize("prediction", ["noise", "clean", "score", "velocity"])
@pytest.mark.parametrize("time_input", ["toward_noise", "toward_data"])
def test_whatever_a_flow_network_predicts_and_however_it_counts_time(prediction, time_input):
    sampler = FlowSampler(method="heun", num_steps=60, time_shift=2.0)
    assert error(GaussianGenerator("linear", prediction, time_input), sampler) < 0.02


@pytest.mark.parametrize(
    ("path", "diffusion", "last_step"),
    [("linear", "linear", "tweedie"), ("linear", "decreasing", "none"), ("gvp", "decreasing", "euler"), ("vp", "sbdm", "mean")],
)
def test_every_amount_of_noise_and_every_last_step(path, diffusion, last_step):
    sampler = FlowSampler(method="euler-maruyama", num_steps=500, diffusion=diffusion, last_step=last_step, last_step_size=0.005)
    assert error(GaussianGenerator(path, "velocity", "toward_data"), sampler) < 0.02
