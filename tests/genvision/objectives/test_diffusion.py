"""Gaussian diffusion: tables, losses and gradients of the official code, and properties of what is added."""

import math

import pytest
import torch

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.dit import DiT
from genvision.objectives.diffusion import DiffusionLoss, DiffusionLossConfig, approximate_normal_cdf
from genvision.objectives.gaussian import GaussianDiffusion, kept_steps
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def official() -> Fixture:
    return Fixture("dit_losses")


def objective(model: DiT, **options) -> DiffusionLoss:
    return DiffusionLoss(DiffusionLossConfig(**options), model, seed=0, batch_size=6)


def tiny(**changes) -> DiT:
    return DiT(**(dict(input_size=2, in_channels=2, patch_size=1, hidden_dim=16, depth=1, num_heads=2, num_classes=3) | changes))


def test_losses_and_gradients_equal_the_official_ones(official):
    model = load_official("dit", official.state, official.config)
    ours, given = objective(model), official.inputs
    x_t = ours.diffusion.mix(given["x0"], given["noise"], given["t"])
    torch.testing.assert_close(x_t, official.outputs["x_t"], atol=official.atol, rtol=0)
    output = model(x_t, given["t"].float(), given["y"])
    losses = ours.losses(output, given["noise"], given["x0"], x_t, given["t"])
    for name, theirs in (("mse", "mse"), ("variance_bound", "vb"), ("loss", "loss")):
        torch.testing.assert_close(losses[name], official.outputs[theirs], atol=official.atol, rtol=5e-5)
    losses["loss"].mean().backward()
    gradients = {
        "blocks.0.attn.qkv.weight": model.blocks[0].attn.qkv.weight,
        "final_layer.linear.weight": model.head.linear.weight,
        "final_layer.linear.bias": model.head.linear.bias,
        "x_embedder.proj.weight": model.patch_embed.proj.weight,
        "y_embedder.embedding_table.weight": model.label_embed.table.weight,
    }
    for name, parameter in gradients.items():
        torch.testing.assert_close(parameter.grad, official.outputs[f"grad/{name}"], atol=official.atol, rtol=5e-5)


def test_the_bound_trains_the_variance_alone(official):
    model = load_official("dit", official.state, official.config)
    ours, given = objective(model), official.inputs
    output = model(official.outputs["x_t"], given["t"].float(), given["y"])
    losses = ours.losses(output, given["noise"], given["x0"], official.outputs["x_t"], given["t"])
    losses["variance_bound"].mean().backward()
    expected = official.outputs["grad_vb_only/final_layer.linear.bias"]
    torch.testing.assert_close(model.head.linear.bias.grad, expected, atol=official.atol, rtol=5e-5)


def test_posteriors_equal_the_official_ones(official):
    diffusion, steps, x_t = GaussianDiffusion.linear(), official.inputs["t"], official.outputs["x_t"]
    epsilon, coefficient = official.outputs["model_output"].chunk(2, dim=1)
    clean = diffusion.clean(x_t, steps, epsilon, "noise")
    torch.testing.assert_close(clean, official.outputs["p_xstart"], atol=official.atol, rtol=5e-5)
    torch.testing.assert_close(diffusion.posterior_mean(x_t, steps, clean), official.outputs["p_mean"], atol=official.atol, rtol=5e-5)
    log_variance = diffusion.learned_log_variance(steps, coefficient)
    torch.testing.assert_close(log_variance, official.outputs["p_log_variance"], atol=official.atol, rtol=5e-5)


def test_tables_equal_the_official_ones(official):
    diffusion, tables = GaussianDiffusion.linear(), official.outputs
    torch.testing.assert_close(diffusion.betas, tables["table/betas"], atol=0, rtol=1e-11)
    torch.testing.assert_close(diffusion.alpha_bars, tables["table/alphas_cumprod"], atol=0, rtol=1e-12)
    torch.testing.assert_close(diffusion.posterior_variance, tables["table/posterior_variance"], atol=0, rtol=1e-9)
    torch.testing.assert_close(diffusion.posterior_log_variance, tables["table/posterior_log_variance_clipped"], atol=0, rtol=1e-9)
    for number, table in enumerate(diffusion.posterior_coefficients, start=1):
        torch.testing.assert_close(table, tables[f"table/posterior_mean_coef{number}"], atol=0, rtol=1e-9)


@pytest.mark.parametrize("name", ["10", "50", "250", "ddim50", "ddim250"])
def test_respaced_schedules_equal_the_official_ones(official, name):
    spacing = "ddim" if name.startswith("ddim") else "even"
    respaced = GaussianDiffusion.linear().respaced(int(name.removeprefix("ddim")), spacing)
    assert torch.equal(respaced.network_steps, official.outputs[f"respace/{name}/timestep_map"])
    torch.testing.assert_close(respaced.betas, official.outputs[f"respace/{name}/betas"], atol=0, rtol=1e-9)
    torch.testing.assert_close(respaced.alpha_bars, official.outputs[f"respace/{name}/alphas_cumprod"], atol=0, rtol=1e-9)


def test_all_steps_respaced_are_all_steps():
    whole = GaussianDiffusion.linear()
    torch.testing.assert_close(whole.respaced(1000).betas, whole.betas, atol=0, rtol=1e-9)
    assert kept_steps(10, 1000, "leading").tolist() == list(range(0, 1000, 100))


@pytest.mark.parametrize(("num", "spacing"), [(0, "even"), (1001, "even"), (999, "ddim")])
def test_impossible_numbers_of_steps_are_refused(num, spacing):
    with pytest.raises(UserError, match=str(num)):
        kept_steps(num, 1000, spacing)


@pytest.mark.parametrize("prediction", ["noise", "clean", "velocity"])
def test_the_right_output_means_the_clean_image(prediction):
    diffusion, steps = GaussianDiffusion.linear(), torch.tensor([0, 300, 999])
    clean, noise = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    x, output = diffusion.mix(clean, noise, steps), diffusion.target(clean, noise, steps, prediction)
    torch.testing.assert_close(diffusion.clean(x, steps, output, prediction), clean, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(diffusion.noise(x, steps, clean), noise)


@pytest.mark.parametrize("prediction", ["noise", "clean", "velocity"])
def test_min_snr_weighs_every_prediction_as_the_same_error_of_the_image(prediction):
    # an error of the clean image, expressed in each prediction, must count min(SNR, gamma) times its square (arXiv:2303.09556, section 3.4)
    gamma, steps = 5.0, torch.tensor([20, 400, 900])
    ours = objective(tiny(prediction=prediction), min_snr_gamma=gamma)
    clean, noise = torch.randn(2, 3, 2, 2, 2)
    x = ours.diffusion.mix(clean, noise, steps)
    wrong = clean + 0.1
    output = ours.diffusion.target(wrong, ours.diffusion.noise(x, steps, wrong), steps, prediction)
    target = ours.diffusion.target(clean, noise, steps, prediction)
    alpha_bars = ours.diffusion.alpha_bars[steps].float()
    expected = 0.01 * (alpha_bars / (1 - alpha_bars)).clamp(max=gamma)
    torch.testing.assert_close(ours.losses(output, target, clean, x, steps)["loss"], expected, atol=1e-4, rtol=1e-2)


def test_a_perfect_model_has_no_error_and_a_fresh_one_that_of_guessing():
    batch = {"codes": torch.randn(512, 2, 2, 2), "labels": torch.zeros(512, dtype=torch.int64), "positions": torch.arange(512)}
    terms = objective(tiny())(tiny(), batch)
    assert terms["mse"].item() == pytest.approx(1.0, abs=0.1)  # it says zero, the noise has variance 1


def test_what_is_drawn_belongs_to_the_position():
    model = tiny(learn_sigma=True)
    torch.nn.init.normal_(model.head.linear.weight)
    batch = {"codes": torch.randn(6, 2, 2, 2), "labels": torch.arange(6) % 3, "positions": torch.arange(60, 66)}
    ours = objective(model)
    whole = ours(model, batch)["loss"]
    parts = [ours(model, {name: value[i : i + 2] for name, value in batch.items()})["loss"] for i in (4, 0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_the_approximate_distribution_is_near_the_true_one():
    x = torch.linspace(-4, 4, 81)
    true = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(approximate_normal_cdf(x), true, atol=3e-4, rtol=0)


@pytest.mark.parametrize("options", [{"min_snr_gamma": 0.0}, {"variance_weight": -1.0}, {"align_weight": -0.1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=f"loss.{next(iter(options))}"):
        DiffusionLossConfig(**options)
