"""Paths from data to noise: limits, derivatives, and conversions that undo each other."""

import pytest
import torch

from genvision.convert import load_official
from genvision.objectives.paths import PATHS, Flow
from parity_fixtures import Fixture

T = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
PREDICTIONS = ("noise", "clean", "velocity", "score")


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 7, 3, 2, 2, generator=generator, dtype=torch.float64)
    return clean, noise


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
class TestPaths:
    def test_it_leads_from_data_to_noise(self, path):
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(path.alpha(ends), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=0.01, rtol=0)
        torch.testing.assert_close(path.sigma(ends), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=0.01, rtol=0)

    def test_the_derivatives_are_those_of_alpha_and_sigma(self, path):
        t = T.clone().requires_grad_()
        for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
            (slope,) = torch.autograd.grad(value(t).sum(), t)
            torch.testing.assert_close(slope, derivative(T), atol=1e-9, rtol=1e-9)

    def test_the_drift_ratio_is_its_formula(self, path):
        formula = path.sigma(T) * path.d_sigma(T) - path.sigma(T) ** 2 * path.d_alpha(T) / path.alpha(T)
        torch.testing.assert_close(path.drift_ratio(T), formula)

    @pytest.mark.parametrize("direction", ["toward_noise", "toward_data"])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_the_right_output_gives_back_what_it_was_made_of(self, path, prediction, direction):
        clean, noise = examples()
        flow = Flow(path, prediction, direction)
        x, output = path.mix(clean, noise, T), flow.target(clean, noise, T)
        torch.testing.assert_close(flow.clean(x, T, output), clean)
        torch.testing.assert_close(flow.noise(x, T, output), noise)
        torch.testing.assert_close(flow.velocity(x, T, output), path.velocity(clean, noise, T))
        torch.testing.assert_close(flow.score(x, T, output), -noise / path.sigma(T).view(-1, 1, 1, 1))
        torch.testing.assert_close(flow.output_of_clean(x, T, clean), output)


def test_velocity_is_made_of_score_and_drift():
    clean, noise = examples()
    for path in PATHS.values():
        x, score = path.mix(clean, noise, T), -noise / path.sigma(T).view(-1, 1, 1, 1)
        ratio, k = (value.view(-1, 1, 1, 1) for value in (path.d_alpha(T) / path.alpha(T), path.drift_ratio(T)))
        torch.testing.assert_close(ratio * x - k * score, path.velocity(clean, noise, T))


@pytest.mark.parametrize("name", ["Linear", "GVP", "VP"])
def test_conversions_equal_those_of_sit(name):
    fixture = Fixture("sit_forward")
    flow = Flow(PATHS[name.lower()], "velocity", "toward_data")
    x, t, output = fixture.inputs["conv_x"], 1 - fixture.inputs["conv_t"], fixture.inputs["conv_v"]
    for what, ours in (("score", flow.score(x, t, output)), ("noise", flow.noise(x, t, output))):
        torch.testing.assert_close(ours, fixture.outputs[f"conv/{name}_{what}_from_velocity"], atol=fixture.atol, rtol=2e-5)
    scores = Flow(PATHS[name.lower()], "score", "toward_data")
    velocity = -scores.velocity(x, t, output)  # the fixture takes the same numbers for scores; its velocity points to the data
    torch.testing.assert_close(velocity, fixture.outputs[f"conv/{name}_velocity_from_score"], atol=fixture.atol, rtol=2e-5)
    clean, noise = fixture.inputs["loss_x1"], fixture.inputs["loss_x0"]
    time = 1 - fixture.outputs[f"loss_t/{name}_velocity"]
    torch.testing.assert_close(flow.path.mix(clean, noise, time), fixture.outputs[f"path/{name}_xt"], atol=fixture.atol, rtol=0)
    torch.testing.assert_close(flow.target(clean, noise, time), fixture.outputs[f"path/{name}_ut"], atol=fixture.atol, rtol=2e-5)


def test_the_flow_of_a_generator_is_read_from_its_configuration():
    fixture = Fixture("sit_forward")
    flow = Flow.of(load_official("sit", fixture.state, fixture.config))
    assert flow.prediction == "velocity" and flow.path is PATHS["linear"]
    assert torch.equal(flow.network_time(torch.tensor([0.25])), torch.tensor([0.75]))
