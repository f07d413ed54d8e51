"""Weights for GPUs; on a CPU torchao computes the same, only slowly."""

import importlib.util

import pytest
import torch
from tiny_models import output, tiny

from genvision.errors import UserError
from genvision.layers.gpu_weights import quantize_on_gpu

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_rounded_but_for_layers_that_decide_much(weights):
    model, plain = tiny("dit", hidden_dim=32).eval(), tiny("dit", hidden_dim=32).eval()
    names = quantize_on_gpu(model, weights, keep=["blocks.1"])
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    with torch.inference_mode():
        before, after = output(plain), output(model)
    distance = (after - before).norm() / before.norm()
    assert 1e-5 < distance < (0.02 if weights == "int8" else 0.1)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_the_command_that_installs_it_is_named():
    with pytest.raises(UserError, match=r"pip install 'genvision\[quant\]'"):
        quantize_on_gpu(tiny("dit"), "int8")


def test_what_no_kernel_can_do_is_refused():
    with pytest.raises(UserError, match="start from bfloat16, and the model is float32"):
        quantize_on_gpu(tiny("dit"), "float8", dynamic=True)
    with pytest.raises(UserError, match=r"compute capability 8\.9"):
        quantize_on_gpu(tiny("dit").to(torch.bfloat16), "float8", dynamic=True)


@needs_torchao
def test_a_model_without_a_layer_of_fitting_sizes_is_refused():
    with pytest.raises(UserError, match="multiples of 16"):
        quantize_on_gpu(torch.nn.Linear(8, 8), "int8")
