"""Fine-tuning by low-rank adapters (LoRA, arXiv:2106.09685), with peft's layers: y = W x + alpha / r B A x, where only A and B are trained.

B starts at zero, so that a model with adapters begins as the one without. In its state dict an adapted layer `x` has `x.base_layer.weight`,
`x.lora_A.default.weight` and `x.lora_B.default.weight`; averages and checkpoints take these as they are, and what is exported is merged.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.training.parts import named_parts
from genvision.training.state import save_tensors

if TYPE_CHECKING:  # importing it takes seconds, so that happens where adapters are asked for
    from peft.tuners.lora import Linear as LoraLinear

ADAPTER = "default"
"""peft's name of an only adapter."""
PEFT_PREFIX = "base_model.model."
"""Of every name in peft's files."""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters in place of training all weights."""

    rank: int = 0
    """r, columns of B and rows of A; 0 trains without adapters. 4 to 64 are usual."""
    alpha: float | None = None
    """What an adapter adds is multiplied by alpha / rank; null takes the rank, so that the factor is 1."""
    dropout: float = 0.0
    """Of what enters an adapter."""
    targets: tuple[str, ...] = ()
    """Linear layers that are adapted, by the ends of their names (qkv, mlp.fc1) or by shell patterns of whole names (blocks.*.attn.*);
    empty: those of attention and feed-forward in all blocks, but not what makes modulations."""
    also_train: tuple[str, ...] = ()
    """Parts that are trained whole besides, named as in optim.train_only: label_embed where classes are new, norms."""

    def __post_init__(self) -> None:
        for name in ("targets", "also_train"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, as a saved configuration has them
        if self.rank < 0:
            raise UserError(f"lora.rank must be at least 0, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UserError(f"lora.alpha must be above 0, got {self.alpha}; null takes the rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.rank and (self.alpha is not None or self.dropout or self.targets or self.also_train):
            raise UserError("lora.rank is 0, so there are no adapters for the other options of lora; give a rank, 8 say, or leave them out")


def add_lora(model: nn.Module, config: LoRAConfig) -> tuple[str, ...]:
    """Put adapters into a model in place, and leave gradients to them and to the parts of `also_train` alone.

    A is drawn from torch's global generator. Called before the model is wrapped or split over processes.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: peft is not installed, or a target is not there.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"lora.rank {config.rank}: peft is not installed; pip install genvision[lora]") from error
    targets = _target_layers(model, config)
    trained_whole = named_parts(model, config.also_train, "lora.also_train")
    if both := sorted(name for name in trained_whole if name.rpartition(".")[0] in targets):
        raise UserError(
            f"lora.also_train: {both[0]} is in a layer with an adapter; name other parts, or leave that layer out of lora.targets"
        )
    whole = [parameter for name, parameter in model.named_parameters() if name in trained_whole and parameter.requires_grad]
    alpha: Any = config.alpha if config.alpha is not None else config.rank  # peft takes fractions, too
    peft_config = LoraConfig(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=targets)
    peft_config._register_custom_module({nn.Linear: _adapted_linear()})
    inject_adapter_in_model(peft_config, model, ADAPTER)
    for parameter in whole:
        parameter.requires_grad_(True)
    adapted = tuple(_adapted_layers(model))
    assert sorted(adapted) == sorted(targets), "peft matched other names"
    return adapted


def merged_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights for the same model without adapters: W + alpha / r B A, summed in float32.

    Args:
        model: with adapters.
        state: an average of its weights, or the gathered ones of a model that is split; its own unless given.
    """
    state = model.state_dict() if state is None else state
    layers, plain = _adapted_layers(model), {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".base_layer.")
        if layer in layers and rest:
            a, b = (state[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
            plain[f"{layer}.{rest}"] = _merged(tensor, a, b, layers[layer].scaling[ADAPTER]) if rest == "weight" else tensor
        elif not _is_of_adapter(name):
            plain[name] = tensor
    return plain


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge the adapters of a model in place; it is a plain one then, which saves and loads like any other."""
    merged = merged_state_dict(model)
    for name, layer in _adapted_layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)
    del model.peft_config
    model.load_state_dict(merged)


def adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What fine-tuning trains and nothing else, by peft's names: `x.lora_A.weight`, `x.lora_B.weight`, and parameters trained whole.

    Args:
        model: with adapters.
        state: as for `merged_state_dict`.
    """
    state = model.state_dict() if state is None else state
    return {_peft_name(name): state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, which `peft.PeftModel.from_pretrained(plain_model, folder)` loads.

    Args:
        model: with adapters.
        state: as for `merged_state_dict`.

    Raises:
        UserError: a parameter was trained whole that peft's format cannot hold, as it stands in no layer that peft could name.
    """
    state = model.state_dict() if state is None else state
    layers = _layers_trained_whole(model)
    inside = tuple(f"{layer}." for layer in layers)
    tensors = adapter_state_dict(model, state) | {name: tensor for name, tensor in state.items() if name.startswith(inside)}
    folder.mkdir(parents=True, exist_ok=True)
    facts: Any = copy(cast(Any, model).peft_config[ADAPTER])
    facts.target_modules, facts.modules_to_save, facts.inference_mode = sorted(_adapted_layers(model)), layers or None, True
    facts.save_pretrained(str(folder))
    save_tensors(folder / "adapter_model.safetensors", {f"{PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()})


def _target_layers(model: nn.Module, config: LoRAConfig) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: dict[str, None] = {}
    for target in config.targets:
        matches = [name for name in linear if fnmatchcase(name, target) or name == target or name.endswith(f".{target}")]
        if not matches:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
            raise UserError(f"lora.targets {target}: no linear layer has a name that ends so; the ends here are {known}")
        found |= dict.fromkeys(matches)
    if config.targets:
        return list(found)
    blocks = set(getattr(model, "_no_split_modules", ()) or ())
    for path, block in model.named_modules():
        if type(block).__name__ in blocks:  # a linear layer of the block itself, not of one of its parts, makes its modulation
            inside = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and "." in name]
            found |= dict.fromkeys(f"{path}.{name}" for name in inside)
    if not found:
        raise UserError(
            f"lora.rank {config.rank}: {type(model).__name__} has no linear layers in its blocks; train parts of it by optim.train_only"
        )
    return list(found)


@cache
def _adapted_linear() -> type["LoraLinear"]:
    """peft's layer, whose weight, where a model reads that itself (nested networks), is the merged one."""
    from peft.tuners.lora import Linear

    class AdaptedLinear(Linear):
        @property
        def weight(self) -> Tensor:
            own: Any = self.get_base_layer().weight
            if self.disable_adapters or self.merged or ADAPTER not in self.lora_A:
                return own
            a, b = (cast(nn.Linear, part[ADAPTER]).weight for part in (self.lora_A, self.lora_B))
            return own + b @ a * self.scaling[ADAPTER]

    return AdaptedLinear


def _adapted_layers(model: nn.Module) -> dict[str, "LoraLinear"]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _adapted_linear())}


def _layers_trained_whole(model: nn.Module) -> list[str]:
    """Layers with trained parameters of their own, and all those that peft would take for one of them, since it compares ends of names."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not _is_of_adapter(name)]
    ends = {name.rpartition(".")[0]: name for name in trained}
    layers = [name for name, _ in model.named_modules() if name.endswith(tuple(ends))]
    for layer, parameter in ends.items():
        if not layer or any(name.startswith(f"{layer}.") for name in layers):
            raise UserError(f"lora.also_train: peft's format cannot hold {parameter}, as no layer holds it alone; export the merged model")
    return layers


def _peft_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".") if _is_of_adapter(name) else name


def _is_of_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (weight.float() + b.float() @ a.float() * scale).to(weight.dtype)
