"""Official checkpoints in: state dicts of the original implementations become our modules."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from genvision.convert.generators import llamagen_gpt
from genvision.convert.readers import fill
from genvision.convert.tokenizers import llamagen_vq, taming_vqgan
from genvision.errors import UserError

Converter = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[nn.Module, dict[str, Tensor]]]

FAMILIES: dict[str, Converter] = {"llamagen-gpt": llamagen_gpt, "llamagen-vq": llamagen_vq, "taming-vqgan": taming_vqgan}
"""Family to a function that makes our empty module and the state dict under our names."""


def load_official(family: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str = "state dict") -> nn.Module:
    """Turn weights of an original implementation into our module, in eval mode.

    Args:
        family: one of `FAMILIES`.
        state_dict: tensors under the original names.
        config: constructor arguments of the original implementation; what is left out has the original default.
        source: named in errors, a file for example.

    Raises:
        UserError: unknown family; or tensors are missing, left over or of another shape (all are listed in one message).
    """
    if family not in FAMILIES:
        raise UserError(f"family '{family}' is unknown; known are {', '.join(sorted(FAMILIES))}")
    module, renamed = FAMILIES[family](state_dict, config)
    fill(module, renamed, source)
    return module.eval()
