import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, output, tiny
from torch import nn

from genvision.errors import UserError
from genvision.layers.packed_ternary import BLOCK, PackedTernaryLinear
from genvision.layers.ternarize import plain_linears, ternarize_linears
from genvision.layers.ternary import TernaryLinear, own_scale, quantized_activations, straight_through, ternary_codes, ternary_scale
from parity_fixtures import Fixture

FIXTURE = Fixture("bitnet_ternary")
CLOSE = dict(rtol=0, atol=FIXTURE.atol)
TRANSFORMERS = sorted(set(MODELS) - {"vq", "kl", "vitok", "titok"})


def layer(measure="mean", bias=True, **options):
    """With the weights of the fixture, in training mode."""
    new = TernaryLinear(16, 12, bias, measure=measure, **options)
    state = {"weight": FIXTURE.inputs["weight"]} | ({"bias": FIXTURE.inputs["bias"]} if bias else {})
    new.load_state_dict(state)
    return new


@pytest.mark.parametrize(("name", "measure", "per_row"), [("mean", "mean", False), ("median", "median", False), ("rowmean", "mean", True)])
def test_scales_codes_and_weights_are_those_of_the_fixture(name, measure, per_row):
    new = layer(measure, per_row=per_row)
    torch.testing.assert_close(new.scale(), FIXTURE.outputs[f"{name}_scale"], **CLOSE)
    assert new.codes().to(torch.int8).equal(FIXTURE.outputs[f"{name}_ternary"])
    torch.testing.assert_close(new.ternary_weight(), FIXTURE.outputs[f"{name}_dequant"], **CLOSE)


@pytest.mark.parametrize("measure", ["mean", "median"])
def test_products_with_8_bit_activations_are_those_of_the_fixture(measure):
    x, outputs = FIXTURE.inputs["x"], FIXTURE.outputs
    assert quantized_activations(F.layer_norm(x, (16,)))[0].to(torch.int16).equal(outputs["x_int8"])
    for name, options in {
        "linear_nobias": dict(bias=False),
        "linear_plain_bias": {},
        "linear_upstream_bias": dict(bias_before_scale=True),
        "upstream_y": dict(bias_before_scale=True),
    }.items():
        y = layer(measure, activation_bits=8, **options)(x)
        torch.testing.assert_close(y, outputs[f"{measure}_{name}"], **CLOSE)


@pytest.mark.parametrize("measure", ["mean", "median"])
def test_gradients_are_those_of_the_fixture(measure):
    new, x = layer(measure, activation_bits=8, bias_before_scale=True), FIXTURE.inputs["x"].clone().requires_grad_()
    new(x).backward(FIXTURE.inputs["grad_y"])
    torch.testing.assert_close(new.weight.grad, FIXTURE.outputs[f"{measure}_upstream_grad_w"], **CLOSE)
    torch.testing.assert_close(x.grad, FIXTURE.outputs[f"{measure}_upstream_grad_x"], **CLOSE)


def test_half_of_the_rounding_is_that_of_the_fixture_and_eval_mode_rounds_in_full():
    new, x = layer(bias=False, activation_bits=8), FIXTURE.inputs["x"]
    new.strength.fill_(0.5)
    torch.testing.assert_close(new(x), FIXTURE.outputs["mean_upstream_nobias_lambda_0.5"], **CLOSE)
    torch.testing.assert_close(new.eval()(x), FIXTURE.outputs["mean_linear_nobias"], **CLOSE)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_gradient_of_a_weight_is_that_of_a_plain_layer_on_the_same_input(strength):
    new, x, grad = layer(per_row=True), torch.randn(3, 5, 16), torch.randn(3, 5, 12)
    new.strength.fill_(strength)
    new(x).backward(grad)
    torch.testing.assert_close(new.weight.grad, grad.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(new.bias.grad, grad.flatten(0, 1).sum(0))


def test_nothing_is_left_of_the_float_at_full_strength_and_nothing_of_the_rounded_at_none():
    z, rounded = torch.randn(1000), torch.randn(1000)
    assert straight_through(z, rounded, 1.0).equal(rounded) and straight_through(z, rounded, torch.tensor(1.0)).equal(rounded)
    assert straight_through(z, rounded, 0.0).equal(z)


@pytest.mark.parametrize("measure", ["mean", "median"])
@pytest.mark.parametrize("per_row", [False, True])
def test_codes_do_not_depend_on_the_size_of_weights(measure, per_row):
    weight = torch.randn(8, 17)
    codes = ternary_codes(weight, ternary_scale(weight, measure, per_row))
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    for factor in (0.25, 3.0, 1000.0):
        assert ternary_codes(factor * weight, ternary_scale(factor * weight, measure, per_row)).equal(codes)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_of_zeros_stays_zero(per_row):
    new = layer(per_row=per_row, bias=False)
    assert new(torch.randn(4, 16))[:, 1].eq(0).all()
    assert PackedTernaryLinear.of(new)(torch.randn(4, 16))[:, 1].eq(0).all()


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_packed_layer_gives_what_the_ternary_one_gives(per_row, packing):
    plain = nn.Linear(1030, 300)  # more than one block, and rows that do not fill their last byte
    assert BLOCK < 300 * 1030
    ternary = TernaryLinear.of(plain, per_row=per_row).eval()
    packed, x = PackedTernaryLinear.of(ternary, packing=packing), torch.randn(2, 3, 1030)
    assert packed.weight.equal(ternary.ternary_weight())
    wanted = ternary(x).detach()
    torch.testing.assert_close(packed(x).detach(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    # products and sums of small integers are exact
    packed.scale.data.fill_(1.0), packed.bias.data.zero_()
    counts = torch.randint(-9, 10, (4, 1030)).float()
    assert packed(counts).equal(counts @ ternary.codes().T)


def test_weights_that_are_ternary_already_are_packed_as_they_are():
    for per_row in (False, True):
        ternary = layer(per_row=per_row)
        plain = nn.Linear(16, 12)
        plain.weight.data = ternary.ternary_weight()
        assert own_scale(plain.weight) is not None and own_scale(ternary.weight) is None
        packed = PackedTernaryLinear.of(plain, per_row=per_row)
        assert packed.weight.equal(plain.weight) and packed.scale.shape == ternary.scale().shape
        assert not (ternary_scale(plain.weight, "mean", per_row) == ternary.scale()).all()  # zeros would count


def test_a_packed_layer_is_saved_and_a_damaged_one_is_found():
    packed, other = PackedTernaryLinear.of(layer()), PackedTernaryLinear(16, 12, per_row=False)
    state = packed.state_dict()
    assert {name: (tensor.dtype, tensor.nbytes) for name, tensor in state.items()} == {
        "codes": (torch.uint8, 48),
        "scale": (torch.float32, 4),
        "bias": (torch.float32, 48),
    }
    other.load_state_dict(state)
    assert other.weight.equal(packed.weight)
    with pytest.raises(UserError, match="hold 48 bytes that no 2bit code makes"):
        other.load_state_dict(state | {"codes": torch.full_like(state["codes"], 255)})


def test_only_scales_and_biases_of_a_packed_layer_are_trained():
    packed, x = PackedTernaryLinear.of(layer(), per_row=True), torch.randn(5, 16)
    packed(x).square().sum().backward()
    assert {name for name, parameter in packed.named_parameters() if parameter.grad is not None} == {"scale", "bias"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_linears_of_blocks_become_ternary_and_all_else_stays(name):
    model, x = tiny(name).eval(), output(tiny(name).eval())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = ternarize_linears(model, per_row=True)
    assert names and all(part.startswith(("blocks.", "decoder_blocks.")) and not part.endswith("modulation") for part in names)
    inside = {
        part for part, module in tiny(name).named_modules() if isinstance(module, nn.Linear) and part.startswith(("blocks", "decoder_b"))
    }
    assert set(names) == {part for part in inside if not part.endswith("modulation")}
    packed = output(model)
    assert (packed - x).abs().max() > 1e-4
    assert plain_linears(model) == names
    torch.testing.assert_close(output(model), packed, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {key.removesuffix(".weight") for key in after if not after[key].equal(before[key])} == set(names)


def test_a_model_in_training_keeps_the_names_and_the_parameters_of_its_floats():
    model = tiny("dit")
    before = dict(model.named_parameters())
    ternarize_linears(model, per_row=False, packed=False)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    in_training = output(model.eval())
    ternarize_linears(model)  # packed with their own measure
    torch.testing.assert_close(output(model), in_training, rtol=1e-4, atol=1e-5)
    assert model.blocks[0].attn.qkv.scale.shape == (1,)


def test_nested_networks_are_those_of_the_packed_weights():
    model, codes, labels = tiny("maskgit").eval(), torch.randint(17, (2, 16)), torch.tensor([0, 3])
    ternarize_linears(model)
    packed = model(codes, labels, nesting=2)
    plain_linears(model)
    torch.testing.assert_close(model(codes, labels, nesting=2), packed, rtol=1e-4, atol=1e-5)


def test_a_ternary_layer_compiles_without_a_break_and_not_anew_for_another_strength():
    new, x = layer(), FIXTURE.inputs["x"]
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    for strength in (0.25, 0.5, 1.0):
        new.strength.fill_(strength)
        with torch._dynamo.config.patch(error_on_recompile=strength > 0.25):
            torch.testing.assert_close(compiled(x), new(x))


def test_layers_can_be_left_out():
    assert all(name.startswith("blocks.1.mlp") for name in ternarize_linears(tiny("llamagen"), exclude=("blocks.0", "*.attention.*")))
    assert ternarize_linears(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), exclude=("0",)) == ["1"]
    with pytest.raises(UserError, match=r"ternary: to_q is no linear layer of LlamaGen"):
        ternarize_linears(tiny("llamagen"), exclude=("to_q",))
    with pytest.raises(UserError, match=r"DiT has no linear layer left"):
        ternarize_linears(tiny("dit"), exclude=("blocks",))
    with pytest.raises(UserError, match="with activation_bits or bias_before_scale cannot be packed"):
        PackedTernaryLinear.of(layer(activation_bits=8))


@pytest.mark.parametrize("per_row", [True, False])
def test_weights_that_are_ternary_already_stay_when_they_are_trained_on(per_row):
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    ternarize_linears(model, per_row=per_row)
    plain_linears(model)
    before = [layer.weight.clone() for layer in model]
    ternarize_linears(model, per_row=per_row, packed=False)
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.ternary_weight(), weight)
    plain_linears(model)
    with pytest.raises(UserError, match="set measure to mean"):
        ternarize_linears(model, measure="median", packed=False)
