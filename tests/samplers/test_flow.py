import pytest
import torch
from diffusion_examples import GaussianGenerator, GivenNoise

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.flow import FlowSampler
from genvision.samplers.randomness import ImageStreams
from parity_fixtures import Fixture

SIT_METHODS = {"euler": "euler", "heun2": "heun", "midpoint": "midpoint", "Euler": "euler-maruyama", "Heun": "stochastic-heun"}


def sit_options(name):
    """ode/<path>_<method>[_cfg] has 9 grid points; sde/<path>_<method>_<diffusion>_<last step>[_cfg] 8 noisy steps and a last one."""
    kind, words = name.split("/")
    path, method, *rest = words.removesuffix("_cfg").split("_")
    options = {"method": SIT_METHODS[method], "num_steps": 8 if kind == "ode" else 9}
    if kind == "sde":
        options |= {"diffusion": rest[0].lower(), "last_step": rest[1].lower()}
    return path, options | ({"guidance_scale": 1.5, "guidance_channels": 3} if name.endswith("_cfg") else {})


@pytest.mark.parametrize("name", sorted(name for name in Fixture("sit_sample").outputs if "dopri5" not in name))
def test_samples_equal_those_of_the_official_sit(name):
    fixture = Fixture("sit_sample")
    path, options = sit_options(name)
    model = load_official("sit", fixture.state, {**fixture.config, "path_type": path})
    noise = GivenNoise(fixture.inputs["z"], fixture.inputs["step_noise"][:, :2])
    sampler = FlowSampler(**options)
    drawn = sampler.sample(model, fixture.inputs["y"], noise)
    expected = fixture.outputs[name]
    expected = expected[-1] if expected.dim() == 5 else expected  # whole trajectories
    torch.testing.assert_close(drawn, expected, atol=fixture.atol, rtol=float(fixture.metadata["rtol"]))


def test_dopri5_is_as_near_to_the_exact_solution_as_the_official_sit():
    # the official solver controls the error of the whole batch and interpolates past the end, so it takes other steps to the same place
    fixture = Fixture("sit_sample")
    model = load_official("sit", fixture.state, fixture.config)
    noise, official = GivenNoise(fixture.inputs["z"]), fixture.outputs["ode/Linear_dopri5"]
    exact = FlowSampler(method="dopri5", rtol=1e-7, atol=1e-9).sample(model, fixture.inputs["y"], noise)
    ours = FlowSampler(method="dopri5").sample(model, fixture.inputs["y"], noise)
    assert (ours - exact).abs().max() < (official - exact).abs().max() < 2e-3
    heun = FlowSampler(method="heun", num_steps=400).sample(model, fixture.inputs["y"], noise)
    torch.testing.assert_close(heun, exact, atol=2e-4, rtol=0)


REPA_METHODS = {
    "euler": {"method": "euler"},
    "heun": {"method": "heun", "last_step": "euler"},
    "euler_maruyama": {"method": "euler-maruyama", "diffusion": "linear"},
}
REPA_GUIDANCE = {
    "nocfg": {},
    "cfg": {"guidance_scale": 1.8},
    "interval": {"guidance_scale": 1.8, "guidance_start": 1 - 0.7},
    "interval2": {"guidance_scale": 1.8, "guidance_start": 1 - 0.8, "guidance_stop": 1 - 0.3},
}


@pytest.mark.parametrize("guidance", sorted(REPA_GUIDANCE))
@pytest.mark.parametrize("method", sorted(REPA_METHODS))
def test_samples_equal_those_of_the_official_repa(method, guidance):
    fixture = Fixture("repa_sample")
    model = load_official("repa-sit", fixture.state, fixture.config)
    sampler = FlowSampler(num_steps=10, **REPA_METHODS[method], **REPA_GUIDANCE[guidance])
    noise = GivenNoise(fixture.inputs["sample_z"], fixture.inputs["step_noise"])
    drawn = sampler.sample(model, fixture.inputs["sample_y"], noise)
    expected = fixture.outputs[f"{method}/{guidance}"]
    torch.testing.assert_close(drawn, expected, atol=fixture.atol, rtol=float(fixture.metadata["rtol"]))
    assert sampler.calls.tolist() == [sampler.network_calls(model)] * 2


@pytest.mark.parametrize(("official_shift", "time_shift"), [("0.0", 1.0), ("0.3", 1 / 0.3)])
def test_samples_equal_those_of_the_official_lightningdit(official_shift, time_shift):
    fixture = Fixture("lightningdit_forward")
    model = load_official("lightningdit", fixture.state, fixture.config)
    sampler = FlowSampler(num_steps=10, time_shift=time_shift, guidance_scale=6.7, guidance_channels=3, guidance_start=0.125)
    grid = 1 - torch.tensor(sampler.grid(model))
    torch.testing.assert_close(grid, fixture.outputs[f"sample_grid_shift{official_shift}"], atol=1e-6, rtol=0)
    drawn = sampler.sample(model, fixture.inputs["sample_y"][:2], GivenNoise(fixture.inputs["sample_z"]))
    torch.testing.assert_close(drawn, fixture.outputs[f"sample_cfg_shift{official_shift}"], atol=fixture.atol, rtol=0)


def gaussian(path="linear", prediction="velocity"):
    return GaussianGenerator(path, prediction, "toward_noise")


METHODS = ["euler", "heun", "midpoint", "euler-maruyama", "stochastic-heun", "dopri5"]


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch(method):
    sampler = FlowSampler(method=method, num_steps=6, guidance_scale=2.0, guidance_start=0.3)
    labels = torch.tensor([0, 1, 1, 0, 1])
    together = sampler.sample(gaussian(), labels, ImageStreams(3, range(5)))
    calls, order = sampler.calls, [4, 2, 0, 1, 3]
    turned = sampler.sample(gaussian(), labels[order], ImageStreams(3, order))
    assert torch.equal(sampler.calls, calls[order])
    alone = torch.cat([sampler.sample(gaussian(), labels[i : i + 1], ImageStreams(3, [i])) for i in range(5)])
    torch.testing.assert_close(turned, together[order])
    torch.testing.assert_close(alone, together)
    assert not torch.allclose(sampler.sample(gaussian(), labels, ImageStreams(4, range(5))), together)


@pytest.mark.parametrize(
    ("options", "plain", "guided"),
    [
        ({"method": "euler"}, 10, 10 + 5),
        ({"method": "heun"}, 20, 20 + 10),
        ({"method": "heun", "last_step": "euler"}, 19, 19 + 9),
        ({"method": "midpoint"}, 20, 20 + 10),
        ({"method": "euler-maruyama"}, 10, 10 + 5),
        ({"method": "euler-maruyama", "last_step": "none"}, 10, 10 + 5),
        ({"method": "stochastic-heun"}, 19, 19 + 9),
    ],
)
def test_the_number_of_calls_is_known_before_and_counted(options, plain, guided):
    noise, labels = ImageStreams(0, range(3)), torch.tensor([0, 1, 0])
    for guidance, calls in (({}, plain), ({"guidance_scale": 3.0, "guidance_start": 0.5}, guided)):
        generator, sampler = gaussian(), FlowSampler(num_steps=10, **options, **guidance)
        sampler.sample(generator, labels, noise)
        assert sampler.network_calls(generator) == calls
        assert sampler.calls.tolist() == [calls] * 3
        assert sum(generator.rows) == 3 * calls  # nothing is computed that is not counted


def test_the_calls_of_dopri5_are_counted_for_each_image():
    generator, sampler = gaussian(), FlowSampler(method="dopri5", guidance_scale=2.0, guidance_stop=0.4, rtol=1e-5)
    assert sampler.network_calls(generator) is None
    sampler.sample(generator, torch.tensor([0, 1, 0, 1]), ImageStreams(0, range(4)))
    assert sum(generator.rows) == int(sampler.calls.sum()) and len(set(sampler.calls.tolist())) > 1
    nowhere = FlowSampler(method="dopri5", guidance_scale=2.0, guidance_start=0.5, guidance_stop=0.5)
    drawn = nowhere.sample(gaussian(), torch.tensor([0, 1]), ImageStreams(0, [0, 1]))
    plain = FlowSampler(method="dopri5").sample(gaussian(), torch.tensor([0, 1]), ImageStreams(0, [0, 1]))
    torch.testing.assert_close(drawn, plain, atol=5e-3, rtol=0)


@pytest.mark.parametrize("prediction", ["noise", "score", "clean"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_nothing_is_divided_by_zero_at_the_ends_of_time(path, prediction):
    for method in METHODS:
        drawn = FlowSampler(method=method, num_steps=5).sample(gaussian(path, prediction), torch.tensor([0, 1]), ImageStreams(0, [0, 1]))
        assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rk4"}, "euler, heun"),
        ({"diffusion": "constant"}, "sigma, linear"),
        ({"last_step": "mean"}, "method euler; choose one of none"),
        ({"method": "heun", "last_step": "tweedie"}, "none, euler"),
        ({"method": "stochastic-heun", "last_step": "none"}, "last_step"),
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": 1, "method": "euler-maruyama"}, "at least 2"),
        ({"time_shift": 0.3}, "1 / 0.3"),
        ({"last_step_size": 1.0}, "last_step_size"),
        ({"rtol": 0.0}, "above 0"),
        ({"method": "dopri5", "time_shift": 2.0}, "time_shift must be 1"),
        ({"method": "dopri5", "guidance_method": "apg", "apg_momentum": -0.5}, "apg_momentum 0"),
        ({"guidance_start": 0.5, "guidance_stop": 0.4}, "interval"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        FlowSampler(**options)


@pytest.mark.parametrize("sampler", [FlowSampler(), DiffusionSampler()])
def test_what_does_not_go_with_a_model_is_refused(sampler):
    generator = gaussian() if isinstance(sampler, FlowSampler) else GaussianGenerator("ddpm", "noise", "step")
    one, noise = torch.tensor([1]), ImageStreams(0, [0])
    with pytest.raises(UserError, match="have 3 channels"):
        sampler.with_options(guidance_scale=2.0, guidance_channels=4).sample(generator, one, noise)
    with pytest.raises(UserError, match="scale_condition"):
        sampler.with_options(scale_condition=1.5).sample(generator, one, noise)
    with pytest.raises(UserError, match=r"classes 0 \.\. 1"):
        sampler.sample(generator, torch.tensor([2]), noise)
    with pytest.raises(UserError, match="have no known tokens; leave known out"):
        sampler.sample(generator, one, noise, known=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="each image needs one label"):
        sampler.sample(generator, one, ImageStreams(0, range(2)))
    with pytest.raises(UserError, match="the guide has path vp"):
        sampler.sample(generator, one, noise, guide=gaussian("vp"))
    generator.has_null_label = False
    sampler.sample(generator, one, noise)
    with pytest.raises(UserError, match="class_dropout"):
        sampler.with_options(guidance_scale=2.0).sample(generator, one, noise)


def test_the_other_familys_models_are_refused():
    with pytest.raises(UserError, match="use DiffusionSampler"):
        FlowSampler().check(GaussianGenerator("ddpm", "noise", "step"))
    with pytest.raises(UserError, match="sbdm is infinite"):
        FlowSampler(method="euler-maruyama", diffusion="sbdm").check(gaussian())


def test_saved_options_come_back(tmp_path):
    FlowSampler(method="heun", time_shift=3.0, guidance_scale=1.8, guidance_stop=0.7).save_pretrained(tmp_path)
    again = FlowSampler.from_pretrained(tmp_path)
    assert (again.config.method, again.config.time_shift, again.guidance.scale, again.guidance.stop) == ("heun", 3.0, 1.8, 0.7)
