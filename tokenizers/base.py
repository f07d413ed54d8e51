"""What every tokenizer answers to: images -> codes -> images, and a description of the codes.

Shapes: images float32 [B, 3, H, W] in [-1, 1]; discrete codes int64 [B, h, w] or [B, L]; continuous codes float
[B, c, h, w] or [B, c, L], already normalised.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genvision.errors import UserError

TOKENIZERS: dict[str, str] = {"VQTokenizer": "genvision.tokenizers.vq"}
"""Class name, as `config.json` records it, to the module that defines it (imported only when needed)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What a generator must know of a tokenizer's codes."""

    image_size: int
    """Side of the square images it was trained on, in pixels."""
    downsample: int
    """Pixels of a side per code of a side."""
    codebook_size: int | None = None
    """Number of codes; None where codes are continuous."""
    channels: int | None = None
    """Channels of continuous codes; None where codes are discrete."""

    @property
    def discrete(self) -> bool:
        return self.codebook_size is not None


class Tokenizer(ABC):
    """Mixed into a ModelMixin: `encode`, `decode` and `spec` are the whole contract."""

    @property
    @abstractmethod
    def spec(self) -> TokenizerSpec: ...

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor: ...

    def check_image_size(self, size: int) -> None:
        """Raises UserError where images of this side cannot be encoded."""
        if size < self.spec.downsample or size % self.spec.downsample:
            raise UserError(
                f"image size {size} does not fit the tokenizer, which makes one code of {self.spec.downsample} x {self.spec.downsample} "
                f"pixels; choose a multiple of {self.spec.downsample}"
            )


def content_hash(module: ModelMixin) -> str:
    """sha256 over the class, its configuration and every tensor: equal hashes mean equal outputs."""
    digest = hashlib.sha256(type(module).__name__.encode())
    config = {key: value for key, value in sorted(dict(module.config).items()) if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tokenizer(path: str | Path) -> Any:
    """Load a saved tokenizer in eval mode.

    Args:
        path: a tokenizer folder, or a pipeline folder that holds one in `tokenizer/`.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "tokenizer" / "config.json").is_file():
        folder = folder / "tokenizer"
    return load_component(folder, TOKENIZERS, "tokenizer").eval()


def load_component(folder: Path, registry: dict[str, str], kind: str) -> Any:
    """Load one component of a pipeline folder by the class that its config.json names, if `registry` knows it."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise UserError(f"{folder}: no {kind} here (config.json is missing); give a folder written by genvision train or import")
    try:
        name = json.loads(config_path.read_text())["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{config_path}: not a component configuration ({error}); write the folder again") from error
    if name not in registry:
        raise UserError(f"{config_path}: class '{name}' is no {kind} of genvision; known are {', '.join(sorted(registry))}")
    cls = getattr(import_module(registry[name]), name)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many types; whatever it is, these files cannot be used
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the {kind} cannot be loaded, its files are damaged or incomplete: {reason}") from error
