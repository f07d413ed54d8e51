"""Which linear layers of a model keep their precision when the others are rounded: what is small, or decides much with little.

That is embeddings of patches, times and labels, what makes modulations (adaLN), and the head. The rest, those of attention and
feed-forward, hold nearly all of the weights.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

FULL_PRECISION = {
    "LlamaGen": ("condition_embed", "head"),
    "RAR": ("blocks.*.modulation", "head"),
    "MaskGIT": ("blocks.*.modulation", "skip_layers", "norm", "to_logits"),
    "MAGE": ("decoder_embed", "head"),
    "DiT": ("time_embed", "scale_embed", "blocks.*.modulation", "head", "projectors"),
}
"""Class of a model to these layers: parts by their names, or shell patterns of whole names. A model of any other class has none."""


def linears_to_round(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """Name to layer of the linear layers whose weights may be rounded.

    Args:
        exclude: layers that stay, besides those of FULL_PRECISION: parts by their names (blocks.0), or shell patterns of whole names.
    """
    full = (*FULL_PRECISION.get(type(model).__name__, ()), *exclude)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in linears.items() if not any(is_meant(name, part) for part in full)}


def is_meant(name: str, part: str) -> bool:
    """Whether a layer's name is that of a part, lies below it, or matches a pattern."""
    if any(letter in part for letter in "*?["):
        return fnmatchcase(name, part)
    return name == part or name.startswith(f"{part}.")
