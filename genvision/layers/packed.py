"""Layers for inference alone: linear ones whose weights are laid out once (`kernels.linear`), and norms."""

import math
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from genvision.kernels.linear import Product, Weights, pack
from genvision.layers.full_precision import linears_to_round
from genvision.layers.mlp import PackedSwiGLU, SwiGLU
from genvision.layers.norm import RMSNorm

Model = TypeVar("Model", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer on a CPU that has no parameters any more, but a product; it is not saved, moved or trained."""

    def __init__(self, in_features: int, out_features: int, product: Product) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x if x.dtype == torch.float32 else x.float())  # autocast

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class PackedRMSNorm(nn.Module):
    """x / rms(x) * weight as four operations in place of nine: x / hypot(|x|, sqrt(C eps)) * (weight sqrt(C))."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        size = norm.weight.shape[0]
        self.scale = norm.weight.detach() * math.sqrt(size)
        self.floor = torch.tensor(math.sqrt(size * norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)).mul_(self.scale)


def prepare_linears(model: Model, weights: Weights = "float32", *, rows: int = 2, by_token: bool = True) -> Model:
    """Lay out the weights of a model's linear layers for reading them with few rows, in place; each old weight is freed at once. RMSNorms,
    of which every token passes dozens, are made of fewer operations.

    The model can only be used for inference afterwards. Layers for which there is nothing better than F.linear stay: all of them on a
    GPU or in another dtype than float32.

    Args:
        weights: `float32` keeps the numbers; `float16` rounds weights to 11 bits; `int8` rounds weights to 63 levels of either sign an
            output and activations to 127 a row. Layers of FULL_PRECISION keep their numbers, but for int8 of a model that draws by token,
            where reading them would take as long as all others: they are rounded to 11 bits.
        rows: about how many rows a product will have. It decides on layouts alone, never on numbers: an image must not depend on its batch.
        by_token: the model draws token by token, with few rows in a product.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is RMSNorm and by_token and _is_plain(child.weight):
                setattr(module, name, PackedRMSNorm(child))
            if type(child) is SwiGLU and _can_pack(child.gate) and _can_pack(child.up):
                setattr(module, name, PackedSwiGLU.joined(child))
    round_these = linears_to_round(model)
    less_rounded: Weights = "float16" if weights == "int8" and by_token else "float32"
    for parent, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if not _can_pack(child):
                continue
            is_full = f"{parent}.{name}".lstrip(".") not in round_these
            product = pack(child.weight, child.bias, less_rounded if is_full else weights, rows)
            if product is not None:
                setattr(module, name, PackedLinear(child.in_features, child.out_features, product))
    return model


def _can_pack(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and _is_plain(layer.weight)


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
