import pytest
import torch
from diffusion_examples import GaussianGenerator

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.dit import DiT
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.flow import FlowSampler
from genvision.samplers.guidance import Guidance
from genvision.samplers.guided_network import GuidedNetwork, JobMemory
from genvision.samplers.modulation import ModulationTables
from genvision.samplers.randomness import ImageStreams
from parity_fixtures import Fixture


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tolerance(fixture):
    return {"atol": fixture.atol, "rtol": float(fixture.metadata.get("rtol", 0))}


@pytest.mark.parametrize("rows", ["together", "apart"])
@pytest.mark.parametrize("family", ["dit", "sit"])
@pytest.mark.parametrize(("output", "guidance"), [("cfg_out", {"scale": 1.5, "channels": 3}), ("cfg_out_all_channels", {"scale": 1.5})])
def test_guided_outputs_equal_the_official_ones(family, output, guidance, rows):
    fixture = Fixture(f"{family}_forward")
    model = load_official(family, fixture.state, fixture.config)
    labels, t = fixture.inputs["cfg_y"][:2], fixture.inputs["cfg_t"][:2].double()
    network = GuidedNetwork(model, labels, Guidance(**guidance), rows=rows)
    guided = network(fixture.inputs["cfg_x"][:2], t if family == "dit" else 1 - t)
    torch.testing.assert_close(guided, fixture.outputs[output][:2], **tolerance(fixture))
    assert network.calls.tolist() == [2, 2]


def test_a_strong_scale_equals_the_official_one():
    fixture = Fixture("dit_forward")
    model = load_official("dit", fixture.state, fixture.config)
    network = GuidedNetwork(model, fixture.inputs["cfg_y"][:2], Guidance(scale=4.0, channels=3))
    guided = network(fixture.inputs["cfg_x"][:2], fixture.inputs["cfg_t"][:2].double())
    torch.testing.assert_close(guided, fixture.outputs["cfg_out_scale4"][:2], **tolerance(fixture))


@pytest.mark.parametrize("name", ["lightningdit_forward", "lightningdit_qknorm", "lightningdit_woshift"])
def test_the_interval_equals_the_official_one(name):
    fixture = Fixture(name)
    model = load_official("lightningdit", fixture.state, fixture.config)
    x, labels = fixture.inputs["cfg_x"][:2], fixture.inputs["cfg_y"][:2]
    start = float(fixture.inputs["cfg_interval_start"])
    for part, calls in (("low", 1), ("high", 2)):
        network = GuidedNetwork(model, labels, Guidance(scale=float(fixture.inputs["cfg_scale"]), channels=3, start=start))
        guided = network(x, 1 - fixture.inputs[f"cfg_t_{part}"][:2].double())
        torch.testing.assert_close(guided, fixture.outputs[f"cfg_{part}"][:2], **tolerance(fixture))
        assert network.calls.tolist() == [calls] * 2
    if "cfg_low_nointerval" in fixture.outputs:
        network = GuidedNetwork(model, labels, Guidance(scale=float(fixture.inputs["cfg_scale"]), channels=3))
        guided = network(x, 1 - fixture.inputs["cfg_t_low"][:2].double())
        torch.testing.assert_close(guided, fixture.outputs["cfg_low_nointerval"][:2], **tolerance(fixture))


def gaussian(**options):
    return GaussianGenerator("linear", "velocity", "toward_noise", **options)


X = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([1, 0, 1, 0])
TIMES = torch.tensor([0.9, 0.5, 0.2, 0.6], dtype=torch.float64)


@pytest.mark.parametrize("rows", ["together", "apart"])
def test_only_rows_inside_the_interval_have_a_second_one(rows):
    generator = gaussian()
    network = GuidedNetwork(generator, LABELS, Guidance(scale=3.0, start=0.3, stop=0.6), rows=rows)  # t in [0.4, 0.7]
    guided = network(X, TIMES)
    assert generator.rows == ([6] if rows == "together" else [4, 2])
    assert network.calls.tolist() == [1, 2, 1, 2]
    conditional, null = generator(X, TIMES, LABELS), generator(X, TIMES, torch.full_like(LABELS, generator.null_label))
    expected = torch.where(torch.tensor([False, True, False, True]).view(4, 1, 1, 1), null + 3 * (conditional - null), conditional)
    torch.testing.assert_close(guided, expected)
    # the scale of another time, and some of the images only
    some = torch.tensor([2, 0])
    again = network(X[some], TIMES[some], guided_at=torch.tensor([0.5, 0.1], dtype=torch.float64), images=some)
    torch.testing.assert_close(again, torch.stack([(null + 3 * (conditional - null))[2], conditional[0]]))
    assert network.calls.tolist() == [2, 2, 3, 2]


def test_out_of_memory_takes_rows_apart_for_the_rest_of_the_job_with_equal_results():
    scarce, memory = gaussian(most_rows=4), JobMemory()
    expected = GuidedNetwork(gaussian(), LABELS, Guidance(scale=3.0))(X, TIMES)
    torch.testing.assert_close(GuidedNetwork(scarce, LABELS, Guidance(scale=3.0), memory=memory)(X, TIMES), expected)
    GuidedNetwork(scarce, LABELS, Guidance(scale=3.0), memory=memory)(X, TIMES)
    assert scarce.rows == [8, 4, 4, 4, 4]
    with pytest.raises(torch.OutOfMemoryError):
        GuidedNetwork(gaussian(most_rows=3), LABELS, Guidance(scale=3.0))(X, TIMES)


def test_autoguidance_by_the_model_itself_is_the_plain_model_and_by_a_weaker_one_the_formula():
    strong, weak = gaussian(), gaussian()
    weak.means = weak.means * 0.5
    plain, other = strong(X, TIMES, LABELS), weak(X, TIMES, LABELS)
    by_itself = GuidedNetwork(strong, LABELS, Guidance(scale=2.5), guide=strong)
    torch.testing.assert_close(by_itself(X, TIMES), plain)
    network = GuidedNetwork(strong, LABELS, Guidance(scale=2.5), guide=weak)
    torch.testing.assert_close(network(X, TIMES), other + 2.5 * (plain - other))
    assert network.calls.tolist() == [2] * 4
    strong.has_null_label = False  # not needed
    FlowSampler(num_steps=3, guidance_scale=2.5).sample(strong, LABELS, ImageStreams(0, range(4)), guide=weak)


@pytest.mark.parametrize("path", ["linear", "ddpm"])
@pytest.mark.parametrize("prediction", ["noise", "clean", "velocity"])
def test_projected_guidance_acts_on_clean_images_whatever_is_predicted(path, prediction):
    t = TIMES if path == "linear" else (TIMES * 999).round()
    generators = [GaussianGenerator(path, name, "step" if path == "ddpm" else "toward_noise") for name in ("clean", prediction)]
    options = {"scale": 4.0, "method": "apg", "apg_norm": 0.5, "apg_eta": 0.2}
    networks = [GuidedNetwork(generator, LABELS, Guidance(**options)) for generator in generators]
    right, clean = networks[0](X, t), networks[1].frame.clean(X, t, networks[1](X, t))
    torch.testing.assert_close(clean, right)
    assert not torch.allclose(right, generators[0](X, t, LABELS))


def test_projected_guidance_with_everything_off_is_classifier_free_guidance():
    off = Guidance(scale=4.0, method="apg", apg_eta=1.0, channels=2)
    for t in (TIMES, torch.zeros(4, dtype=torch.float64)):
        expected = GuidedNetwork(gaussian(), LABELS, Guidance(scale=4.0, channels=2))(X, t)
        torch.testing.assert_close(GuidedNetwork(gaussian(), LABELS, off)(X, t), expected)


def test_times_out_of_range_are_refused():
    for t in (-0.01, 1.01, float("nan")):
        with pytest.raises(UserError, match="outside 0"):
            GuidedNetwork(gaussian(), LABELS, Guidance())(X, torch.full((4,), t, dtype=torch.float64))


def small_dit(**options):
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 3, "patch_size": 2, "hidden_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = DiT(**sizes, path="linear", prediction="velocity", **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


class Counted:
    """Counts the rows of modulation that a model is asked for."""

    def __init__(self, model):
        self.model, self.rows = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *inputs, **options):
        assert "modulation" in options, "computed inside the network"
        return self.model(*inputs, **options)

    def modulation_rows(self, t, labels, drop=None, scale=None):
        self.rows += len(t)
        return self.model.modulation_rows(t, labels, drop, scale)


def draw(sampler, model, labels, seed=0, indices=None):
    return sampler.sample(model, torch.tensor(labels), ImageStreams(seed, range(len(labels)) if indices is None else indices))


def without_tables(sampler, model, labels):
    plain = sampler.with_options()
    plain.memory = JobMemory()
    plain.memory.tables = ModulationTables(max_bytes=0)
    return draw(plain, model, labels)


@pytest.mark.parametrize("method", ["euler", "heun", "euler-maruyama", "dopri5"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, "guidance_start": 0.4}])
def test_tables_rows_and_batches_change_nothing_but_the_time_it_takes(method, guidance):
    model, labels = small_dit(), [1, 4, 1, 1, 0]
    sampler = FlowSampler(method=method, num_steps=5, **guidance)
    drawn = draw(sampler, model, labels)
    torch.testing.assert_close(without_tables(sampler, model, labels), drawn, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw(sampler.with_options(rows="apart"), model, labels), drawn, atol=1e-5, rtol=1e-5)
    alone = torch.cat([draw(sampler, model, labels[i : i + 1], indices=[i]) for i in range(5)])
    torch.testing.assert_close(alone, drawn, atol=1e-5, rtol=1e-5)


def test_modulation_is_computed_once_a_job():
    model, sampler = Counted(small_dit()), FlowSampler(num_steps=6, guidance_scale=3.0)
    draw(sampler, model, [1, 3, 1, 3])
    first, conditions = model.rows, 3  # two classes and the null one
    assert first == 6 * conditions + conditions + 1  # the table, what notices changes, and one row to see the size
    draw(sampler.with_options(guidance_scale=2.0), model, [3, 1, 1, 1])  # another sampler of the same job
    assert model.rows == first + conditions  # to see that the weights are still the same
    draw(sampler, model, [2, 1, 1, 1])  # one class more
    assert model.rows == first + conditions + conditions + (6 + conditions + 1) + 1


@pytest.mark.parametrize("change", ["in place", "behind autograd's back", "load_state_dict"])
def test_changed_weights_are_noticed(change):
    model, sampler = small_dit(), FlowSampler(num_steps=4, guidance_scale=2.0)
    before = draw(sampler, model, [1, 2])
    weight = model.blocks[1].modulation.weight
    if change == "in place":
        weight.add_(0.05)
    elif change == "load_state_dict":
        model.load_state_dict({name: value + 0.05 for name, value in model.state_dict().items()})
    else:
        weight.data.copy_(weight.data + 0.05)
    after = draw(sampler, model, [1, 2])
    torch.testing.assert_close(after, without_tables(sampler, model, [1, 2]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_scale_conditioned_models_are_told_the_scale_and_zero_with_the_null_class():
    model, x = small_dit(scale_conditioned=True), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    labels, t = torch.tensor([1, 4]), torch.tensor([0.3, 0.6], dtype=torch.float64)

    def output(labels, scale):
        return model(x, t.float(), labels, scale=torch.full((2,), scale))

    null = output(torch.full_like(labels, model.null_label), 0.0)
    for told, scale in ((1.45, 1.45), (None, 1.0)):
        network = GuidedNetwork(model, labels, Guidance(scale=2.0), scale_condition=told)
        torch.testing.assert_close(network(x, t), null + 2 * (output(labels, scale) - null), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(labels, 1.45), output(labels, 1.0), atol=1e-3)
    drawn = draw(FlowSampler(num_steps=3, scale_condition=1.45), model, [1, 4])
    assert not torch.allclose(draw(FlowSampler(num_steps=3), model, [1, 4]), drawn, atol=1e-3)


def test_sequences_of_latents_are_drawn_too():
    torch.manual_seed(0)
    model = DiT(in_channels=3, sequence_length=5, hidden_dim=16, depth=1, num_heads=2, num_classes=5, learn_sigma=True).eval()
    torch.nn.init.normal_(model.head.linear.weight, std=0.1)
    assert draw(DiffusionSampler(num_steps=4, guidance_scale=2.0, guidance_channels=2), model, [1, 2]).shape == (2, 3, 5)
