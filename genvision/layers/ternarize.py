"""From linear layers to ternary ones and back, in place, for whole models."""

from collections.abc import Sequence

import torch
from torch import nn

from genvision.errors import UserError
from genvision.kernels.ternary_packing import Packing
from genvision.layers.full_precision import is_meant, linears_to_round
from genvision.layers.packed_ternary import PackedTernaryLinear
from genvision.layers.ternary import Measure, TernaryLinear, own_scale


def ternarize_linears(
    model: nn.Module,
    *,
    measure: Measure = "mean",
    per_row: bool = True,
    exclude: Sequence[str] = (),
    packed: bool = True,
    packing: Packing = "2bit",
) -> list[str]:
    """Make linear layers ternary, in place.

    Args:
        measure: of |W|, which gives the scale.
        per_row: a scale for every output row, instead of one for the matrix.
        exclude: as `linears_to_round` takes it.
        packed: PackedTernaryLinear, for inference; else TernaryLinear, for training, with the same parameters as before. Layers that are
            TernaryLinear already are packed with their own measure.
        packing: of packed layers.

    Returns:
        Names of the layers that were changed.

    Raises:
        UserError: `exclude` names a layer that is not there, or nothing is left.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for part in exclude:
        if not any(is_meant(name, part) for name in linears):
            raise UserError(f"ternary: {part} is no linear layer of {type(model).__name__}, nor a part with any; name one of its layers")
    chosen = linears_to_round(model, exclude)
    if not chosen:
        raise UserError(f"ternary: {type(model).__name__} has no linear layer left to make ternary; exclude fewer")
    for name, layer in chosen.items():
        if packed:
            replace(model, name, PackedTernaryLinear.of(layer, measure=measure, per_row=per_row, packing=packing))
        else:
            new = TernaryLinear.of(layer, measure=measure, per_row=per_row)
            _keep_scale(new, name)
            replace(model, name, new)
    return list(chosen)


@torch.no_grad()
def _keep_scale(layer: TernaryLinear, name: str) -> None:
    """Enlarge weights that are ternary already, so that their own scale is measured: the zeros among them would make it smaller."""
    own = own_scale(layer.weight)
    if own is None:
        return
    if layer.measure != "mean":
        raise UserError(f"ternary: the weights of {name} are ternary already, whose median may be 0; set measure to mean")
    if layer.per_row or bool(((own == own.max()) | (own == 0)).all()):
        layer.weight.mul_((own / layer.scale()).unsqueeze(1))


@torch.no_grad()
def plain_linears(model: nn.Module) -> list[str]:
    """Make ternary layers, of either kind, plain ones with the weights scale * code, in place; gives their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear | PackedTernaryLinear)}
    for name, layer in found.items():
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight = nn.Parameter(layer.ternary_weight())
        if layer.bias is not None:
            new.bias = layer.bias
        replace(model, name, new.train(layer.training))
    return list(found)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
