import pytest
import torch
from torch import nn

from genvision.layers.packed import PackedLinear, prepare_linears
from genvision.models.llamagen import LlamaGen
from genvision.models.rar import RAR

SIZES = {"codebook_size": 50, "grid_size": 4, "hidden_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def models():
    for model in (LlamaGen(**SIZES, num_kv_heads=1), LlamaGen(**SIZES, condition="text", text_length=3, text_dim=8), RAR(**SIZES)):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        yield model.eval()


@torch.inference_mode()
def logits_by_cache(model, condition, codes, mask=None):
    """Of every position, [B, N, V]: the first from `start`, the others from `extend`."""
    first, cache = model.start(condition, mask)
    rows = [first] + [model.extend(codes[:, i], cache, mask) for i in range(codes.shape[1] - 1)]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("rows", [1, 3])  # for either there is another layout
def test_cached_steps_with_packed_weights_give_the_logits_of_the_plain_parallel_pass(rows):
    for model in models():
        codes = torch.randint(0, 50, (3, 16))
        condition = torch.randn(3, 3, 8) if model.prefix_length == 3 else torch.tensor([0, 4, 5])
        with torch.inference_mode():
            expected = model(codes[:, :15], condition) if isinstance(model, LlamaGen) else model(codes, condition)
        torch.testing.assert_close(logits_by_cache(model, condition, codes), expected, rtol=1e-4, atol=1e-4)
        prepare_linears(model, rows=rows)
        left = [module for module in model.modules() if type(module) is nn.Linear]
        assert all(rows == 1 and layer.out_features < layer.in_features for layer in left)
        torch.testing.assert_close(logits_by_cache(model, condition, codes), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_other_dtypes_stay_and_what_decides_much_is_rounded_less():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4).double())
    prepare_linears(model, "int8")
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [PackedLinear, PackedLinear, nn.Linear]
    model, x = LlamaGen(**SIZES).eval(), torch.randn(2, 32)
    nn.init.normal_(model.head.weight)
    expected = model.head(x), model.blocks[0].attention.proj(x)
    prepare_linears(model, "int8")
    found = model.head(x), model.blocks[0].attention.proj(x)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert 1e-6 < errors[0] < 1e-3 < errors[1] < 3e-2


def test_a_packed_model_keeps_no_second_copy_of_its_weights():
    model = prepare_linears(LlamaGen(**SIZES).eval(), rows=2)
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {"table", "token_embed"}


@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_numbers_do_not_depend_on_how_many_rows_are_foreseen(weights):
    for index in (0, 2):  # LlamaGen and RAR
        codes, logits = torch.randint(0, 50, (2, 16)), []
        for rows in (1, 8, 30, 1000):
            model = prepare_linears(list(models())[index], weights, rows=rows)
            logits.append(logits_by_cache(model, torch.tensor([0, 4]), codes))
        for others in logits[1:]:
            torch.testing.assert_close(others, logits[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_autocast_draws_with_packed_weights_too():
    model = next(models())
    prepare_linears(model, rows=2)
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = model.start(torch.tensor([0, 4]))
        assert model.extend(torch.tensor([1, 2]), cache).isfinite().all()
