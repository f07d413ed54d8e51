"""A folder that holds a network with packed ternary layers: config.json, the tensors, and quantization.json, which says which layers.

The tensors stand in a file of another name than that of a float model. diffusers would fill such layers with random numbers otherwise,
and only warn; now it finds no weights.
"""

import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from genvision.errors import UserError
from genvision.kernels.ternary_packing import Packing
from genvision.layers.packed_ternary import PackedTernaryLinear
from genvision.layers.ternarize import replace

DESCRIPTION = "quantization.json"
TENSORS = "packed_ternary.safetensors"


def packed_layers(model: nn.Module) -> dict[str, PackedTernaryLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedTernaryLinear)}


def is_packed(folder: Path) -> bool:
    """Whether a component's folder holds packed weights."""
    return (folder / DESCRIPTION).is_file()


def save_packed(model: Any, folder: Path, **facts: Any) -> None:
    """Write a diffusers model with packed layers.

    Args:
        facts: how the weights were made, for readers; loading needs none of them.
    """
    from safetensors.torch import save_file

    layers = packed_layers(model)
    (packing,) = {layer.packing for layer in layers.values()}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(str(folder))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / TENSORS, {"format": "pt"})
    description = {"weights": "ternary", **facts, "packing": packing, "layers": list(layers)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load_packed(kind: Any, folder: Path) -> Any:
    """The model of a folder that `save_packed` wrote, in eval mode; at no time with float weights in these layers.

    Args:
        kind: its class, a diffusers model.

    Raises:
        UserError: quantization.json is damaged, or belongs to another model. What is wrong with the other files is raised as it comes.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    names, packing = _read_description(folder / DESCRIPTION)
    state = load_file(folder / TENSORS)
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) > 1:
        raise UserError(f"{folder / TENSORS}: holds floats of {len(floats)} types, where one is expected; write the folder again")
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(kind.load_config(str(folder)))
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name in names:
        if name not in linear:
            raise UserError(f"{folder / DESCRIPTION}: {name} is no linear layer of {kind.__name__}; write the folder again")
        old, scale = linear[name], state.get(f"{name}.scale")
        per_row = scale is not None and scale.numel() > 1
        new = PackedTernaryLinear(old.in_features, old.out_features, old.bias is not None, per_row=per_row, packing=packing)
        replace(model, name, new)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_description(path: Path) -> tuple[list[str], Packing]:
    try:
        content = json.loads(path.read_text())
        weights, packing, layers = content["weights"], content["packing"], content["layers"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a description of packed weights ({error}); write the folder again") from error
    if weights != "ternary" or packing not in get_args(Packing):
        known = f"ternary in {' or '.join(get_args(Packing))} is known"
        raise UserError(f"{path}: weights '{weights}' in packing '{packing}' are unknown, {known}; a newer genvision may have written them")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise UserError(f"{path}: layers must be a list of names; write the folder again")
    return layers, packing


def tensor_bytes(model: nn.Module) -> int:
    """What parameters and buffers of a model take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))
