"""Official checkpoints in: state dicts of the original implementations become our modules."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from genvision.convert.diffusers_dit import diffusers_dit
from genvision.convert.dit import dit, lightningdit, repa_sit, sit
from genvision.convert.generators import llamagen_gpt
from genvision.convert.kl import autoencoder_kl
from genvision.convert.mage import mage
from genvision.convert.maskgit import halton_maskgit, maskgit_bert, maskgit_jax
from genvision.convert.rar import rar
from genvision.convert.readers import CONTAINERS, fill
from genvision.convert.signatures import guess_family
from genvision.convert.titok import titok
from genvision.convert.tokenizers import llamagen_vq, mage_vqgan, maskgit_vqgan, taming_vqgan
from genvision.convert.vitok import vitok
from genvision.errors import UserError

Converter = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[nn.Module, dict[str, Tensor]]]

FAMILIES: dict[str, Converter] = {
    "autoencoder-kl": autoencoder_kl,
    "diffusers-dit": diffusers_dit,
    "dit": dit,
    "halton-maskgit": halton_maskgit,
    "lightningdit": lightningdit,
    "llamagen-gpt": llamagen_gpt,
    "llamagen-vq": llamagen_vq,
    "mage": mage,
    "mage-vqgan": mage_vqgan,
    "maskgit-bert": maskgit_bert,
    "maskgit-jax": maskgit_jax,
    "maskgit-vqgan": maskgit_vqgan,
    "rar": rar,
    "repa-sit": repa_sit,
    "sit": sit,
    "taming-vqgan": taming_vqgan,
    "titok": titok,
    "vitok": vitok,
}
"""Family to a function that makes our empty module and the state dict under our names."""

AVERAGED = {"dit", "sit", "lightningdit", "repa-sit"}
"""Families whose published scores are those of the averaged weights, which their own loaders prefer."""


def containers(family: str) -> tuple[str, ...]:
    """The containers of a training checkpoint, in the order in which weights of this family are looked for."""
    return ("ema", *CONTAINERS) if family in AVERAGED else CONTAINERS


def load_official(family: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str = "state dict") -> nn.Module:
    """Turn weights of an original implementation into our module, in eval mode.

    Args:
        family: one of `FAMILIES`.
        state_dict: tensors under the original names.
        config: constructor arguments of the original implementation; what is left out has the original default.
        source: named in errors, a file for example.

    Raises:
        UserError: unknown family; tensors are missing, left over or of another shape (all are listed in one message); or they look like
            another family's.
    """
    if family not in FAMILIES:
        raise UserError(f"family '{family}' is unknown; known are {', '.join(sorted(FAMILIES))}")
    try:
        module, renamed = FAMILIES[family](state_dict, config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    try:
        fill(module, renamed, source)
    except UserError as error:
        looks_like = guess_family(state_dict)
        if looks_like is not None and family not in looks_like.split(" or "):
            raise UserError(
                f"{source}: looks like a checkpoint of {looks_like}, not of {family}; import it under a name of that family"
            ) from error
        raise
    return module.eval()
