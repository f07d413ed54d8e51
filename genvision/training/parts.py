"""Parts of a model by words, patterns and beginnings of names: what is trained where not all of it is."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from genvision.errors import UserError

WORDS = ("attention", "norms")


def named_parts(model: nn.Module, parts: Iterable[str], option: str) -> set[str]:
    """Names of the parameters that are meant by

    - `attention`: everything in attention layers (projections, and norms of queries and keys), whatever they are called;
    - `norms`: scales and biases of normalisation layers, those within attention too; the layers that make modulations (adaLN) are none;
    - a shell pattern (with *, ? or []) of a whole dotted name, `*` for dots as well: `blocks.*.norm?.weight`;
    - any other word: names that begin with it, in whole parts: `decoder`, `decoder.conv_out`.

    Args:
        option: who asks, for the message.

    Raises:
        UserError: one of them means no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for part in parts:
        matches = _of_kind(model, part) if part in WORDS else {name for name in names if _is_named(name, part)}
        if not matches:
            raise UserError(f"{option} {part}: {_nothing_there(names, part)}")
        found |= matches
    return found


def _is_named(name: str, part: str) -> bool:
    if any(letter in part for letter in "*?["):
        return fnmatchcase(name, part)
    return name == part or name.startswith(f"{part}.")


def _of_kind(model: nn.Module, word: str) -> set[str]:
    """Parameters of the layers of one kind, found by their classes."""
    attention, norms = _classes()
    found = set()
    for path, module in model.named_modules():
        if word == "attention" and isinstance(module, attention):
            inside = [name for name, _ in module.named_parameters()]
        elif word == "norms" and isinstance(module, norms):
            inside = [name for name, _ in module.named_parameters(recurse=False)]  # a modulated norm's modulation is a layer of its own
        else:
            continue
        found |= {f"{path}.{name}" if path else name for name in inside}
    return found


def _classes() -> tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]:
    """Attention layers and norms of all models; imported here, as they take seconds and few runs ask for them."""
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    from genvision.layers.attention import Attention
    from genvision.layers.nested import NestedAttention
    from genvision.layers.norm import RMSNorm
    from genvision.layers.transformer import SelfAttention
    from genvision.models.maskgit_blocks import ModulatedNorm
    from genvision.tokenizers.conv import AttnBlock
    from genvision.tokenizers.titok import SelfAttention as TiTokAttention

    attention = (Attention, NestedAttention, SelfAttention, TiTokAttention, AttnBlock, DiffusersAttention)
    return attention, (RMSNorm, ModulatedNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def _nothing_there(names: list[str], part: str) -> str:
    if part == "attention":
        return "the model has no attention"
    if part == "norms":
        return "the norms of this model have no weights; name other parts"
    top = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
    return f"the model has no part of that name; its parts are {top}"
