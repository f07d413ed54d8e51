import pytest
import torch
import torch.nn.functional as F

from genvision.kernels import linear
from genvision.kernels.linear import ACTIVATION_LEVELS, WEIGHT_LEVELS, choose_layout, has, pack, quantize_rows


@pytest.mark.parametrize(
    ("weights", "rows", "tolerance"),
    [("float32", 1, 1e-6), ("float32", 4, 1e-6), ("float32", 8, 1e-6), ("float16", 2, 1e-3), ("int8", 2, 3e-2)],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [33, 7])
@pytest.mark.parametrize("shape", [(1, 20), (3, 20), (2, 5, 20), (40, 20), (0, 20)])
def test_a_packed_product_is_the_linear_layer(weights, rows, tolerance, with_bias, num_outputs, shape):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(num_outputs, 20), torch.randn(num_outputs) if with_bias else None, torch.randn(shape)
    product, expected = pack(weight, bias, weights, rows), F.linear(x, weight, bias)
    if product is None:
        assert (weights, rows, num_outputs) == ("float32", 1, 7)  # F.linear is the best for one row of a wide matrix
        return
    with torch.inference_mode():
        found = product(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_where_private_operations_are_missing_another_layout_gives_the_same_numbers(monkeypatch):
    weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(3, 16)
    before = {weights: pack(weight, bias, weights, 3)(x) for weights in ("float32", "int8")}
    monkeypatch.setattr(linear, "has", lambda layout: False)
    assert choose_layout("float32", 3) == choose_layout("float16", 3) == "inputs first"
    torch.testing.assert_close(pack(weight, bias, "float32", 3)(x), before["float32"])
    torch.testing.assert_close(pack(weight, bias, "int8", 3)(x), before["int8"])


def test_an_operation_with_other_arguments_counts_as_missing(monkeypatch):
    assert has("int8")
    monkeypatch.setitem(linear._ARGUMENTS, "quantized.linear_prepack", ("W", "B", "something new"))
    has.cache_clear()
    assert not has("int8")
    monkeypatch.undo()
    has.cache_clear()


def test_int8_sums_are_exact_and_do_not_saturate():
    weight, x = torch.ones(4, 512), torch.ones(2, 512)  # all at the largest levels: every pair of products is the largest there is
    found = pack(weight, None, "int8", 2)(torch.cat([x, -x]))
    torch.testing.assert_close(found, torch.tensor([512.0, 512.0, -512.0, -512.0])[:, None].expand(4, 4), rtol=1e-6, atol=0)
    torch.manual_seed(0)
    weight, x = torch.randn(32, 200), torch.randn(5, 200) ** 3
    (codes, scale), (levels, rows) = quantize_rows(weight, WEIGHT_LEVELS), quantize_rows(x, ACTIVATION_LEVELS)
    expected = (levels.double() @ codes.double().t()) * scale[:, 0].double() * rows.double()
    torch.testing.assert_close(pack(weight, None, "int8", 2)(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_an_int8_row_is_worth_the_same_alone_and_among_others():
    torch.manual_seed(0)
    product, x = pack(torch.randn(24, 48), None, "int8", 4), torch.randn(6, 48) * torch.tensor([1, 1e3, 1e-3, 0, 5, 1]).unsqueeze(1)
    together = product(x)
    for i in range(6):
        assert torch.equal(product(x[i : i + 1]), together[i : i + 1])
    assert torch.equal(together[3], torch.zeros(24))


def test_layouts_are_chosen_by_rows():
    assert choose_layout("float32", 1) == "inputs first"
    assert choose_layout("float32", 1, is_wide=True) == "as is"
    assert choose_layout("float32", 2) == choose_layout("float32", 48) == "onednn"
    assert choose_layout("float32", 49) == "as is"
    assert pack(torch.randn(4, 4), None, "float32", 256) is None
    assert choose_layout("int8", 4096) == "int8"
    with pytest.raises(ValueError, match="choose one of float32, float16, int8"):
        pack(torch.randn(4, 4), None, "int4", 2)
