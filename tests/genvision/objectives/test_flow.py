"""Flow matching: the official losses, training times, and what REPA and LightningDiT add."""

import pytest
import torch

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.dit import DiT
from genvision.objectives.denoising import Noised, alignment_loss
from genvision.objectives.flow import FlowLossConfig, FlowMatching
from parity_fixtures import Fixture

WEIGHTS = {"wvelocity": "velocity", "wlikelihood": "likelihood"}
SIT_LOSSES = sorted(name.removeprefix("loss/") for name in Fixture("sit_forward").outputs if name.startswith("loss/"))


def objective(model: DiT, **options) -> FlowMatching:
    return FlowMatching(FlowLossConfig(**options), model, seed=0, batch_size=8)


def tiny(**changes) -> DiT:
    options = dict(input_size=2, in_channels=2, patch_size=1, hidden_dim=16, depth=1, num_heads=2, num_classes=3)
    return DiT(**(options | {"path": "linear", "prediction": "velocity"} | changes))


@pytest.mark.parametrize("name", SIT_LOSSES)
def test_losses_equal_those_of_sit(name):
    fixture = Fixture("sit_forward")
    path, prediction, *weight = name.split("_")
    model = load_official("sit", fixture.state, fixture.config | {"path_type": path, "prediction": prediction})
    ours = objective(model, weighting=WEIGHTS[weight[0]] if weight else "none")
    low, high = ours.interval
    clean, noise = fixture.inputs["loss_x1"], fixture.inputs["loss_x0"]
    t = 1 - ((1 - high) + (high - low) * fixture.inputs["loss_u"])  # the official interval counts from the noise
    if f"loss_t/{name}" in fixture.outputs:
        torch.testing.assert_close(1 - t, fixture.outputs[f"loss_t/{name}"], atol=1e-6, rtol=0)
    output = model(ours.flow.path.mix(clean, noise, t), ours.flow.network_time(t), fixture.inputs["loss_y"])
    losses = ours.losses(output, ours.flow.target(clean, noise, t), t)
    torch.testing.assert_close(losses, fixture.outputs[f"loss/{name}"], atol=fixture.atol, rtol=2e-5)


def test_the_direction_loss_equals_that_of_lightningdit():
    fixture = Fixture("lightningdit_forward")
    model = load_official("lightningdit", fixture.state, fixture.config)
    ours = objective(model, direction_weight=1.0)
    clean, noise, t = fixture.inputs["loss_x1"], fixture.inputs["loss_x0"], 1 - fixture.inputs["loss_t"]
    noised = Noised(ours.flow.path.mix(clean, noise, t), ours.flow.target(clean, noise, t), ours.flow.network_time(t), t)
    terms = ours.terms(model(noised.x_t, noised.network_time, fixture.inputs["loss_y"]), clean, noised)
    torch.testing.assert_close(terms["loss"], fixture.outputs["total"].squeeze(), atol=fixture.atol, rtol=0)
    torch.testing.assert_close(terms["mse"], fixture.outputs["loss"].mean(), atol=fixture.atol, rtol=0)
    torch.testing.assert_close(terms["direction"], fixture.outputs["cos_loss"].mean(), atol=fixture.atol, rtol=0)


def test_logit_normal_times_equal_those_of_lightningdit():
    fixture = Fixture("lightningdit_forward")
    u = torch.special.ndtr(-fixture.inputs["loss_normal"].double())  # its time counts from the noise
    times = FlowLossConfig(time_sampling="logit_normal").times(u)
    torch.testing.assert_close(1 - times, fixture.inputs["loss_t"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_losses_equal_those_of_repa(path):
    fixture = Fixture("repa_sample")
    model = load_official("repa-sit", fixture.state, fixture.config | {"path_type": path})
    ours, t = objective(model), fixture.inputs["loss_t"]
    clean, noise = fixture.inputs["loss_x0"], fixture.inputs["loss_noise"]
    output, projected = model(ours.flow.path.mix(clean, noise, t), ours.flow.network_time(t), fixture.inputs["y"], with_features=True)
    losses = ours.losses(output, ours.flow.target(clean, noise, t), t)
    torch.testing.assert_close(losses, fixture.outputs[f"loss/{path}_denoise"], atol=fixture.atol, rtol=5e-5)
    alignment = alignment_loss(projected[0], fixture.inputs["loss_z"])
    torch.testing.assert_close(alignment, fixture.outputs[f"loss/{path}_proj"].squeeze(), atol=fixture.atol, rtol=5e-5)


def test_alignment_is_added_and_needs_features():
    model = tiny(align_depth=1, align_dims=(6,), align_hidden=8)
    batch = {"codes": torch.randn(8, 2, 2, 2), "labels": torch.zeros(8, dtype=torch.int64), "positions": torch.arange(8)}
    terms = objective(model, align_weight=0.5)(model, batch | {"features": torch.randn(8, 4, 6)})
    torch.testing.assert_close(terms["loss"], terms["mse"] + 0.5 * terms["alignment"])
    with pytest.raises(UserError, match="encode the data with --features"):
        objective(model)(model, batch)
    with pytest.raises(UserError, match=r"features have shape \[9, 6\]"):
        objective(model)(model, batch | {"features": torch.randn(8, 9, 6)})


def test_a_shift_moves_times_to_the_noise_and_keeps_the_ends():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(FlowLossConfig(time_shift=3.0).times(u), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    lightning = FlowLossConfig(time_shift=1 / 0.3).times(u)  # its shift 0.3 in a time that counts from the noise
    theirs = 1 - 0.3 * (1 - u) / (1 - 0.7 * (1 - u))
    torch.testing.assert_close(lightning, theirs.float())


def test_logit_normal_times_have_the_middle():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = FlowLossConfig(time_sampling="logit_normal", time_mean=0.4, time_std=0.7).times(u).double()
    z = torch.logit(t)
    assert z.mean().item() == pytest.approx(0.4, abs=0.01) and z.std().item() == pytest.approx(0.7, abs=0.01)
    assert FlowLossConfig(time_sampling="logit_normal").times(torch.zeros(1, dtype=torch.float64)).isfinite().all()


def test_loss_falls_on_one_batch():
    model, generator = tiny(), torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 3
    batch = {"codes": labels.view(-1, 1, 1, 1) - torch.ones(8, 2, 2, 2), "labels": labels, "positions": torch.arange(8)}
    batch["codes"] = batch["codes"] + 0.01 * torch.randn(8, 2, 2, 2, generator=generator)
    ours, optimizer = objective(model), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = ours(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_drawn_belongs_to_the_position():
    model = tiny()
    torch.nn.init.normal_(model.head.linear.weight)
    batch = {"codes": torch.randn(6, 2, 2, 2), "labels": torch.arange(6) % 3, "positions": torch.arange(60, 66)}
    ours = objective(model, time_sampling="logit_normal", direction_weight=1.0)
    whole = ours(model, batch)["loss"]
    parts = [ours(model, {name: value[i : i + 2] for name, value in batch.items()})["loss"] for i in (4, 0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("options", [{"time_std": 0.0}, {"time_shift": -1.0}, {"direction_weight": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=f"loss.{next(iter(options))}"):
        FlowLossConfig(**options)


def test_a_weighting_needs_a_noise_or_score_prediction():
    with pytest.raises(UserError, match=r"loss.weighting velocity is for noise and score predictions"):
        objective(tiny(), weighting="velocity")
