"""A layer holds smaller ones: the first heads and hidden units, sliced out, compute what the layer computes at that nesting."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genvision.layers.mlp import SwiGLU
from genvision.layers.nested import NestedAttention, NestedMLP, NestedSwiGLU, TokenCache

C, H, D, F_ = 12, 4, 3, 16
"""Width, heads, channels of a head, hidden units."""


def attention(**options) -> NestedAttention:
    return NestedAttention(C, H, **options)


def first_heads(layer: NestedAttention, count: int) -> NestedAttention:
    """A layer of its own out of the first heads of another."""
    small = NestedAttention(C, count, head_dim=D, qkv_bias=layer.qkv.bias is not None, normalize_qk=layer.normalize_qk)
    inner = count * D
    parts = torch.cat([torch.arange(inner) + start for start in (0, H * D, 2 * H * D)])  # rows of queries, keys and values
    state = {"qkv.weight": layer.qkv.weight[parts], "proj.weight": layer.proj.weight[:, :inner], "proj.bias": layer.proj.bias}
    if layer.qkv.bias is not None:
        state["qkv.bias"] = layer.qkv.bias[parts]
    small.load_state_dict(state)
    return small


def first_units(layer: NestedMLP | NestedSwiGLU, count: int) -> NestedMLP | NestedSwiGLU:
    small = type(layer)(C, count)
    state = {}
    for name, tensor in layer.state_dict().items():
        if name.startswith(("fc2.", "down.")):
            state[name] = tensor[:, :count] if name.endswith("weight") else tensor
        else:
            state[name] = tensor[:count]
    small.load_state_dict(state)
    return small


class TestAttention:
    @pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"normalize_qk": True}], ids=str)
    @pytest.mark.parametrize("nesting", [1, 2, 4])
    def test_the_first_heads_are_a_layer_of_their_own(self, nesting, options):
        layer, x = attention(**options), torch.randn(2, 5, C)
        torch.testing.assert_close(layer(x, nesting=nesting), first_heads(layer, H // nesting)(x), atol=1e-6, rtol=1e-5)

    def test_it_is_the_usual_attention(self):
        layer, x = attention(), torch.randn(2, 5, C)
        usual = torch.nn.MultiheadAttention(C, H, batch_first=True)
        usual.load_state_dict(
            {
                "in_proj_weight": layer.qkv.weight,
                "in_proj_bias": layer.qkv.bias,
                "out_proj.weight": layer.proj.weight,
                "out_proj.bias": layer.proj.bias,
            }
        )
        torch.testing.assert_close(layer(x), usual(x, x, x)[0], atol=1e-6, rtol=1e-5)

    def test_queries_and_keys_are_normalised_over_all_heads(self):
        layer, x = attention(normalize_qk=True, qkv_bias=False), torch.randn(1, 5, C)
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        q, k = (y / y.square().mean(-1, keepdim=True).add(1e-5).sqrt() for y in (q, k))
        heads = [y.unflatten(-1, (H, D)).transpose(1, 2) for y in (q, k, v)]
        weights = (heads[0] @ heads[1].mT / D**0.5).softmax(-1)
        torch.testing.assert_close(layer(x), layer.proj((weights @ heads[2]).transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)

    def test_gradients_stay_within_the_nested_layer(self):
        layer = attention()
        layer(torch.randn(2, 5, C), nesting=2).square().sum().backward()
        rows = layer.qkv.weight.grad.view(3, H, D, C)
        assert rows[:, :2].any((1, 2, 3)).all() and not rows[:, 2:].any()
        biases = layer.qkv.bias.grad.view(3, H, D)
        assert biases[:, :2].any() and not biases[:, 2:].any()
        assert layer.proj.weight.grad[:, : 2 * D].any() and not layer.proj.weight.grad[:, 2 * D :].any()

    @pytest.mark.parametrize("nesting", [1, 2])
    def test_cached_positions_are_seen_as_they_were_read(self, nesting):
        layer, cache = attention(), TokenCache()
        old, new = torch.randn(2, 5, C), torch.randn(2, 2, C)
        rows = torch.tensor([[0, 3], [1, 4]])
        mixed = old.scatter(1, rows.unsqueeze(-1).expand(-1, -1, C), new)
        with torch.no_grad():
            layer(old, nesting=nesting, cache=cache, layer=7)
            read = layer(new, nesting=nesting, cache=cache, layer=7, rows=rows)
            whole = layer(mixed, nesting=nesting)
        torch.testing.assert_close(read, torch.stack([whole[b, rows[b]] for b in range(2)]), atol=1e-6, rtol=1e-5)


class TestFeedForward:
    @pytest.mark.parametrize("make", [NestedMLP, NestedSwiGLU])
    @pytest.mark.parametrize("nesting", [1, 2, 8])
    @pytest.mark.parametrize("with_gradients", [True, False])
    def test_the_first_units_are_a_layer_of_their_own(self, make, nesting, with_gradients):
        layer, x = make(C, F_), torch.randn(2, 5, C)
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(layer(x, nesting), first_units(layer, F_ // nesting)(x), atol=1e-6, rtol=1e-5)

    def test_the_whole_layer_is_the_usual_one(self):
        x = torch.randn(2, 5, C)
        gated = NestedSwiGLU(C, F_)
        with torch.no_grad():
            torch.testing.assert_close(gated(x), SwiGLU.forward(gated, x), atol=1e-6, rtol=1e-5)
        for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
            mlp = NestedMLP(C, F_, activation=activation)
            torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate)), atol=1e-6, rtol=1e-5)

    def test_dropout_behind_the_activation_can_be_left_out(self):
        x = torch.randn(2, 5, C)
        usual, outer = NestedMLP(C, F_, dropout=0.5), NestedMLP(C, F_, dropout=0.5, hidden_dropout=0.0)
        outer.load_state_dict(usual.state_dict())
        whole = usual.eval()(x)
        kept = outer(x) / 2
        assert torch.isclose(kept, whole, atol=1e-6).logical_or(kept == 0).all() and 0.2 < (kept == 0).float().mean() < 0.8
        assert not torch.isclose(usual.train()(x) / 2, whole, atol=1e-6).logical_or(usual(x) == 0).all()

    @pytest.mark.parametrize("make", [NestedMLP, NestedSwiGLU])
    def test_gradients_stay_within_the_nested_layer(self, make):
        layer = make(C, F_)
        layer(torch.randn(2, 5, C), 4).square().sum().backward()
        for name, parameter in layer.named_parameters():
            units = parameter.grad.mT if name in ("fc2.weight", "down.weight") else parameter.grad
            assert units[: F_ // 4].any() and (name == "fc2.bias" or not units[F_ // 4 :].any())


@pytest.mark.parametrize("nesting", [1, 2])
def test_the_count_of_multiplications_is_that_of_the_products(nesting):
    x = torch.randn(1, 5, C)
    for layer, count in (
        (attention(), attention().multiply_adds(5, 5, nesting)),
        (NestedMLP(C, F_), NestedMLP(C, F_).multiply_adds(5, nesting)),
        (NestedSwiGLU(C, F_), NestedSwiGLU(C, F_).multiply_adds(5, nesting)),
    ):
        # the fused attention of CPUs is not counted
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            layer(x, nesting=nesting)
        assert counter.get_total_flops() == 2 * count
