"""The diffusion transformer by itself; outputs of the official weights are tested in tests/genvision/convert/test_dit.py."""

import pytest
import torch

from genvision.errors import UserError
from genvision.models.dit import DiT

VARIANTS = {
    "dit": {"learn_sigma": True},
    "sit": {"path": "linear", "prediction": "velocity", "time_input": "toward_data", "learn_sigma": True},
    "lightningdit": {"path": "linear", "prediction": "velocity", "norm": "rms", "mlp": "swiglu", "use_rope": True, "patch_size": 1},
    "qk-norm": {"path": "gvp", "prediction": "velocity", "norm": "rms", "use_qk_norm": True},
    "layer-qk-norm": {"path": "vp", "prediction": "noise", "use_qk_norm": True},
    "no-shift": {"use_shift": False, "use_rope": True},
    "scale": {"path": "linear", "prediction": "velocity", "scale_conditioned": True},
    "aligned": {"path": "linear", "prediction": "velocity", "align_depth": 1, "align_dims": (6, 7), "align_hidden": 16},
    "sequence": {"sequence_length": 5, "use_rope": True},
}


def tiny(**changes) -> DiT:
    options = dict(input_size=4, in_channels=3, patch_size=2, hidden_dim=16, depth=2, num_heads=2, num_classes=5)
    return DiT(**(options | changes))


def awake(model: DiT) -> DiT:
    """Fresh weights output exactly zero: give every parameter some."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model: DiT, num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, *model.code_shape, generator=generator)
    return x, torch.rand(num, generator=generator), torch.arange(num) % model.num_classes


def told(model: DiT, num: int = 3) -> dict:
    return {"scale": torch.linspace(1, 2, num)} if model.config.scale_conditioned else {}


@pytest.mark.parametrize("name", VARIANTS)
class TestVariants:
    def test_output_has_the_shape_of_the_latents(self, name):
        model = awake(tiny(**VARIANTS[name]))
        output = model(*inputs(model), **told(model))
        assert output.shape == (3, model.out_channels, *model.code_shape[1:])
        assert model.out_channels == (6 if name == "dit" else 3)

    def test_a_fresh_model_says_zero_whatever_it_sees(self, name):
        model = tiny(**VARIANTS[name])
        assert not model(*inputs(model), **told(model)).any()

    def test_saving_and_loading_changes_nothing(self, name, tmp_path):
        model = awake(tiny(**VARIANTS[name]))
        model.save_pretrained(tmp_path)
        loaded = DiT.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(*inputs(model), **told(model)), model(*inputs(model), **told(model)))
        assert dict(loaded.config)["time_input"] == model.config.time_input

    def test_the_gradient_reaches_every_parameter(self, name):
        model = awake(tiny(**VARIANTS[name]))
        output = model(*inputs(model, 7), **told(model, 7), with_features=name == "aligned", drop=torch.arange(7) > 4)
        total = sum(part.square().sum() for part in [output[0], *output[1]]) if name == "aligned" else output.square().sum()
        total.backward()
        without = {key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
        assert not without

    def test_rows_of_modulation_stand_for_time_and_label(self, name):
        model = awake(tiny(**VARIANTS[name]))
        x, t, labels = inputs(model)
        rows = model.modulation_rows(t, labels, **told(model))
        torch.testing.assert_close(model(x, t, labels, modulation=rows), model(x, t, labels, **told(model)), atol=1e-6, rtol=0)

    def test_checkpointing_changes_no_gradient(self, name):
        gradients, weights = [], awake(tiny(**VARIANTS[name])).state_dict()
        for on in (False, True):
            model = tiny(**VARIANTS[name]).train()
            model.load_state_dict(weights)
            if on:
                model.enable_gradient_checkpointing()
            model(*inputs(model), **told(model), drop=torch.zeros(3, dtype=torch.bool)).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert len(gradients[0]) == len(gradients[1])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "lightningdit", "sequence"])
def test_it_compiles_without_a_graph_break(name):
    model = awake(tiny(**VARIANTS[name]))
    with torch.no_grad():
        expected = model(*inputs(model))
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(*inputs(model)), expected, atol=1e-5, rtol=1e-4)


def test_labels_are_dropped_in_training_and_on_demand():
    model = awake(tiny(class_dropout=0.5))
    x, t, labels = inputs(model, 64)
    x, t = x[:1].expand(64, -1, -1, -1), t[:1].expand(64)
    null = model(x, t, torch.full_like(labels, model.null_label))
    assert torch.equal(model(x, t, labels, drop=torch.ones(64, dtype=torch.bool)), null)
    kept = model(x, t, labels)
    model.train()
    changed = (model(x, t, labels) - kept).flatten(1).abs().amax(1) > 1e-6
    assert 16 < int(changed.sum()) < 48


def test_without_dropout_there_is_no_null_class():
    model = tiny(class_dropout=0.0)
    assert not model.has_null_label and model.label_embed.table.weight.shape[0] == 5
    with pytest.raises(UserError, match="null condition"):
        model.hidden_states(torch.zeros(1, 3, 4, 4), [0])


def test_hidden_states_are_what_the_blocks_give():
    model = awake(tiny(**VARIANTS["sit"]))
    states = model.hidden_states(torch.randn(2, 3, 4, 4), [0, 2])
    assert [tuple(state.shape) for state in states] == [(2, 4, 16)] * 2 and not torch.equal(*states)


def test_time_features_follow_the_rule_of_the_original_or_of_diffusers():
    t = torch.tensor([0.0, 999.0])
    for shift, divisor in ((0, 128), (1, 127)):
        features = tiny(time_freq_shift=shift).time_embed.features(t)
        last = 999 * 10000 ** (-127 / divisor)
        assert features[1, 127] == pytest.approx(torch.tensor(last).cos().item(), abs=1e-5)
        assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_time_scale_multiplies_the_time():
    plain, scaled = tiny(path="linear"), tiny(path="linear", time_scale=1000.0)
    assert torch.equal(scaled.time_embed.features(torch.tensor([0.5])), plain.time_embed.features(torch.tensor([500.0])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"norm": "batch"}, "norm 'batch' is unknown; choose one of layer, rms"),
        ({"path": "ddpm", "time_input": "toward_data"}, "time_input toward_data does not go with path ddpm"),
        ({"path": "linear", "time_input": "step"}, "time_input step does not go with path linear"),
        ({"prediction": "score"}, "prediction score is for flows"),
        ({"input_size": 5}, "input_size 5 must be a multiple of patch_size 2"),
        ({"hidden_dim": 18}, "hidden_dim 18"),
        ({"align_depth": 1}, "align_depth 1 must lie in"),
        ({"class_dropout": 1.5}, "class_dropout must lie in 0 .. 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


def test_a_scale_is_told_to_scale_conditioned_models_only():
    plain, conditioned = tiny(), tiny(scale_conditioned=True)
    with pytest.raises(UserError, match="to no others; this model was given one"):
        plain(*inputs(plain), scale=torch.ones(3))
    with pytest.raises(UserError, match="this model got none"):
        conditioned(*inputs(conditioned))
