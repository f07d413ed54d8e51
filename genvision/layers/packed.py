"""Linear layers for inference alone, whose weights are laid out once (`kernels.linear`)."""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from genvision.kernels.linear import Product, Weights, pack
from genvision.layers.full_precision import linears_to_round
from genvision.layers.mlp import PackedSwiGLU, SwiGLU

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer on a CPU that has no parameters any more, but a product; it is not saved, moved or trained."""

    def __init__(self, in_features: int, out_features: int, product: Product) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def prepare_linears(model: Model, weights: Weights = "float32", *, rows: int = 2) -> Model:
    """Lay out the weights of a model's linear layers for reading them with few rows, in place; each old weight is freed at once.

    The model can only be used for inference afterwards. Layers for which there is nothing better than F.linear stay: all of them on a
    GPU or in another dtype than float32.

    Args:
        weights: `float32` keeps the numbers; `float16` rounds weights to 11 bits; `int8` rounds weights to 63 levels of either sign an
            output and activations to 127 a row. Layers of FULL_PRECISION keep their numbers.
        rows: about how many rows a product will have.

    Returns:
        The same model.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is SwiGLU and _can_pack(child.gate) and _can_pack(child.up):
                setattr(module, name, PackedSwiGLU.joined(child))
    round_these = linears_to_round(model)
    for parent, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if not _can_pack(child):
                continue
            rounded = weights if f"{parent}.{name}".lstrip(".") in round_these else "float32"
            product = pack(child.weight, child.bias, rounded, rows)
            if product is not None:
                setattr(module, name, PackedLinear(child.in_features, child.out_features, product))
    return model


def _can_pack(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
