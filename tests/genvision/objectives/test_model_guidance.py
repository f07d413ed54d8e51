"""Model-guidance: the recorded targets, which rows are guided, and what is evaluated."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.dit import DiT
from genvision.objectives.diffusion import DiffusionLoss, DiffusionLossConfig
from genvision.objectives.draws import TrainingDraws, stochastic_round
from genvision.objectives.flow import FlowLossConfig, FlowMatching
from genvision.objectives.model_guidance import ModelGuidanceConfig
from genvision.training.ema import EMA
from genvision.training.generator_stage import GeneratorStage
from parity_fixtures import FOLDER, Fixture, _below


def tiny(**changes) -> DiT:
    options = dict(input_size=2, in_channels=2, patch_size=1, hidden_dim=16, depth=1, num_heads=2, num_classes=3)
    model = DiT(**(options | {"path": "linear", "prediction": "velocity"} | changes))
    torch.nn.init.normal_(model.head.linear.weight)
    torch.nn.init.normal_(model.blocks[0].modulation.weight)
    return model


def objective(model: DiT, batch_size: int = 8, **options) -> FlowMatching:
    guidance = ModelGuidanceConfig(**({"scale": 1.5, "start_step": 0} | options))
    return FlowMatching(FlowLossConfig(guidance=guidance), model, seed=0, batch_size=batch_size)


def batch(num: int = 8) -> dict[str, torch.Tensor]:
    return {"codes": torch.randn(num, 2, 2, 2), "labels": torch.arange(num) % 3, "positions": torch.arange(num)}


def test_targets_and_losses_equal_the_recorded_ones():
    fixture = Fixture("mg_target")
    given, expected = fixture.inputs, fixture.outputs
    config = fixture.config | {"time": "toward_noise"}
    online = load_official("sit", fixture.state, config)
    averaged = load_official("sit", _below(load_file(FOLDER / "mg_target.safetensors"), "ema_state/"), config)
    ours = objective(online, max_time=float(given["mg_high"]), drop_rate=1 / 8, guided_rate=0.5)
    ours.begin_step(0, averaged)
    positions = torch.arange(8)
    draws = TrainingDraws(0, positions)
    rows = ours.guidance.rows(positions, given["t"], draws)
    assert torch.equal(rows.dropped, given["y_in"] == online.null_label)
    assert torch.equal(rows.weight > 0, torch.cat([expected["w"] > 0, torch.zeros(4, dtype=torch.bool)]))
    rows = rows._replace(weight=torch.cat([expected["w"], torch.zeros(4)]))  # the recorded rows have scales of their own
    x_t = ours.flow.path.mix(given["x0"], given["noise"], given["t"])
    torch.testing.assert_close(x_t, expected["x_t"], atol=fixture.atol, rtol=0)
    target = ours.flow.target(given["x0"], given["noise"], given["t"])
    target = target + ours.guidance.correction(x_t, given["t"], given["y"], rows, draws)
    torch.testing.assert_close(target, expected["target"], atol=fixture.atol, rtol=0)
    losses = ours.losses(online(x_t, given["t"], given["y"], drop=rows.dropped), target, given["t"])
    torch.testing.assert_close(losses, expected["loss_per_sample"], atol=fixture.atol, rtol=0)
    losses.mean().backward()
    gradient = expected["grad/final_layer.linear.weight"]
    torch.testing.assert_close(online.head.linear.weight.grad, gradient, atol=fixture.atol, rtol=0)


def averaged(model):
    return EMA(model, (0.9,), network=copy.deepcopy(model))


def test_before_the_start_step_targets_are_plain():
    model, examples = tiny(), batch()
    ours, losses = objective(model, start_step=10), []
    for average in (averaged(model), averaged(tiny())):
        ours.begin_step(9, average)
        losses.append(ours(model, examples)["loss"])
    assert torch.equal(*losses)
    assert ours.guidance.num_guided == 0 and ours.guidance.num_dropped in (0, 1)
    ours.begin_step(10, averaged(model))
    assert ours.guidance.num_guided == 8 - ours.guidance.num_dropped


def test_only_guided_rows_are_evaluated_twice():
    model, seen = tiny(), []

    def average(x, t, labels, drop):
        seen.append((len(x), labels, drop.any().item()))
        return model(x, t, labels, drop=drop)

    ours = objective(model, guided_rate=0.5, drop_rate=0.25, max_time=1.0)
    ours.begin_step(0, average)
    ours(model, batch())
    ((count, labels, dropped),) = seen
    assert count == 8 and not dropped
    assert labels[:4].tolist() == [0, 1, 2, 0] and (labels[4:] == model.null_label).all()


def test_other_labels_can_stand_for_no_label():
    model, seen = tiny(), []

    def average(x, t, labels, drop):
        seen.append(labels)
        return model(x, t, labels, drop=drop)

    ours = objective(model, base="other_label", drop_rate=0.0, max_time=1.0)
    ours.begin_step(0, average)
    ours(model, batch())
    own, other = seen[0].chunk(2)
    assert (own != other).all() and (other < model.num_classes).all()


def test_the_number_of_dropped_rows_is_right_in_the_mean():
    counts = [stochastic_round(2.6, 0, step) for step in range(500)]
    assert set(counts) == {2, 3} and sum(counts) / 500 == pytest.approx(2.6, abs=0.06)


def test_noisy_rows_are_not_guided():
    ours = objective(tiny(), max_time=0.6)
    ours.begin_step(0, averaged(tiny()))
    positions, t = torch.arange(8), torch.linspace(0, 1, 8)
    rows = ours.guidance.rows(positions, t, TrainingDraws(0, positions))
    assert not rows.weight[t >= 0.6].any() and (rows.weight[(t < 0.6) & ~rows.dropped] > 0).sum() >= 4


def test_scale_conditioned_models_learn_a_range_of_scales():
    model = tiny(scale_conditioned=True)
    ours = objective(model, scale=1.0, scale_max=3.0, guided_rate=0.5, drop_rate=0.25, max_time=1.0)
    ours.begin_step(0, averaged(model))
    positions, t = torch.arange(8), torch.zeros(8)
    rows = ours.guidance.rows(positions, t, TrainingDraws(0, positions))
    torch.testing.assert_close(rows.told_scale[:4], 1 + rows.weight[:4])
    assert rows.told_scale[:4].unique().numel() == 4 and rows.told_scale[4:].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert ours(model, batch())["loss"].isfinite()


def test_diffusion_is_guided_too_and_its_variance_is_not():
    model = tiny(path="ddpm", prediction="noise", learn_sigma=True)
    config = DiffusionLossConfig(guidance=ModelGuidanceConfig(scale=2.0, start_step=0, drop_rate=0.0, max_time=1.0))
    ours = DiffusionLoss(config, model, seed=0, batch_size=8)
    losses = []
    for average in (averaged(model), lambda x, t, labels, drop: torch.zeros(len(x), 4, 2, 2)):
        ours.begin_step(0, average)
        losses.append(ours(model, batch())["mse"])
    assert not torch.equal(*losses)


def test_the_average_is_the_model_with_its_averaged_weights():
    model = tiny()
    average = averaged(model)
    with torch.no_grad():
        model.head.linear.weight.add_(1.0)
    inputs = (torch.randn(2, 2, 2, 2), torch.rand(2), torch.zeros(2, dtype=torch.int64))
    keep = torch.zeros(2, dtype=torch.bool)
    output = average(*inputs, drop=keep)
    with average.applied():
        torch.testing.assert_close(model(*inputs, drop=keep), output)
    assert not output.requires_grad and not torch.allclose(model(*inputs, drop=keep), output)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.5}, {"scale": 2.0, "scale_max": 1.5}, {"drop_rate": 0.6, "guided_rate": 0.6}, {"max_time": 0.0}, {"start_step": -1}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=r"loss\.guidance\."):
        ModelGuidanceConfig(**options)


def test_it_needs_a_null_class_and_the_right_kind_of_model():
    with pytest.raises(UserError, match=r"model\.class_dropout is 0"):
        objective(tiny(class_dropout=0.0))
    with pytest.raises(UserError, match=r"scale_max and model\.scale_conditioned go together"):
        objective(tiny(), scale_max=2.0)
    with pytest.raises(UserError, match=r"scale_max and model\.scale_conditioned go together"):
        objective(tiny(scale_conditioned=True))


def test_an_automatic_scale_rises_while_samples_get_worse_and_falls_while_they_get_better():
    guidance = objective(tiny(), scale=3.0, auto_every=10, auto_rate=0.5).guidance
    scales = []
    for fid in (50.0, 60.0, 70.0, 40.0, 40.0):
        guidance.adapt(fid)
        scales.append(guidance.scale)
    assert scales == [1.0, 2.0, 2.5, 1.75, 1.375]
    guidance.begin_step(0, averaged(tiny()))
    rows = guidance.rows(torch.arange(8), torch.zeros(8), TrainingDraws(0, torch.arange(8)))
    assert set(rows.weight.tolist()) <= {0.375, 0.0} and rows.weight[0] == 0.375


def test_the_stage_scores_samples_at_its_steps_and_keeps_the_scale():
    model, fids = tiny(), iter([50.0, 60.0])
    stage = GeneratorStage(model, objective(model, auto_every=2, auto_rate=0.5, scale=2.0), torch.nn.Identity(), fid=lambda _: next(fids))
    stage.before_step(0, averaged(model))
    accelerator = Accelerator(cpu=True)
    logged = [stage.after_step(step, accelerator, partial(nullcontext, model)) for step in (1, 2, 3, 4)]
    assert [terms["guidance_scale"] for terms in logged] == [1.0, 1.0, 1.0, 1.5]
    assert "guidance_fid" not in logged[0] and logged[3]["guidance_fid"] == 60.0
    other = GeneratorStage(model, objective(model, auto_every=2), torch.nn.Identity())
    other.load_state_dict(stage.state_dict())
    assert other.objective.guidance.scale == 1.5 and model.training
