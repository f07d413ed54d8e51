"""Weights of 8 bits on GPUs, by torchao, which has the kernels for them; for CPUs there is genvision.layers.packed.

`int8` keeps weights as bytes with a scale an output and multiplies in the type of the activations: half the memory of bfloat16, and less
to read where rows are few (token by token). `float8` is the same with e4m3 floats; `dynamic` rounds activations, too, to multiply in
8 bits, which is for many rows (a DiT). Weight-only forms are fast only behind torch.compile, which fuses their scaling into the product.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from genvision.errors import UserError
from genvision.layers.full_precision import linears_to_round

GpuWeights = Literal["int8", "float8"]
MULTIPLE = 16
"""Of both sizes of a matrix that is multiplied in 8 bits."""
FLOAT8_PRODUCTS = (8, 9)
"""Compute capability from which a GPU multiplies 8-bit floats."""


def quantize_on_gpu(model: nn.Module, weights: GpuWeights, *, dynamic: bool = False, keep: Sequence[str] = ()) -> list[str]:
    """Round the weights of a model's linear layers to 8 bits, in place, for inference; the model cannot be saved by genvision then.

    Args:
        model: on its device, in the type that it will compute in.
        weights: `int8` or `float8`.
        dynamic: round activations as well, a scale a row; float8 then needs bfloat16 and a GPU of compute capability 8.9.
        keep: layers that stay besides those that always do, as `linears_to_round` takes them.

    Returns:
        Names of the layers that were changed: those whose sizes are multiples of 16.

    Raises:
        UserError: torchao is not installed, or the model or its device cannot do this.
    """
    if dynamic and weights == "float8":
        _check_float8_products(next(model.parameters()))
    config = _config(weights, dynamic)
    from torchao.quantization import quantize_

    chosen = [
        name
        for name, layer in linears_to_round(model, keep).items()
        if type(layer) is nn.Linear and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    ]
    if not chosen:
        raise UserError(
            f"weights '{weights}': no linear layer of {type(model).__name__} has sizes that are multiples of {MULTIPLE}; leave it out"
        )
    quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    return chosen


def _config(weights: GpuWeights, dynamic: bool) -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise UserError(f"weights '{weights}' on a GPU need torchao ({error}); pip install 'genvision[quant]'") from error
    if weights == "int8":
        return quantization.Int8DynamicActivationInt8WeightConfig() if dynamic else quantization.Int8WeightOnlyConfig()
    if dynamic:
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    return quantization.Float8WeightOnlyConfig()


def _check_float8_products(parameter: torch.Tensor) -> None:
    if parameter.dtype != torch.bfloat16:
        raise UserError(
            f"float8 products start from bfloat16, and the model is {str(parameter.dtype).removeprefix('torch.')}; convert it first"
        )
    if parameter.device.type != "cuda" or torch.cuda.get_device_capability(parameter.device) < FLOAT8_PRODUCTS:
        raise UserError("float8 products need a GPU of compute capability 8.9 or more; take float8 without dynamic, or int8")
