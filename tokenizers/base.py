"""What every tokenizer answers to: images -> codes -> images, and a description of the codes.

Shapes: images float32 [B, 3, H, W] in [-1, 1]; discrete codes int64 [B, h, w] or [B, L]; continuous codes float
[B, c, h, w] or [B, c, L], already normalised.
"""

import hashlib
import inspect
import json
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.packed_storage import is_packed, load_packed

TOKENIZERS: dict[str, str] = {
    "VQTokenizer": "genvision.tokenizers.vq",
    "ViTok": "genvision.tokenizers.vit",
    "KLTokenizer": "genvision.tokenizers.kl",
    "AutoencoderKL": "genvision.tokenizers.kl",
    "TiTok": "genvision.tokenizers.titok",
    "PixelTokenizer": "genvision.tokenizers.pixels",
}
"""Class name, as `config.json` records it, to the module that defines it (imported only when needed)."""

PIXELS = {"pixels": 3, "pixels:gray": 1}
"""Names that stand for pixels themselves in the place of a tokenizer's folder, and their channels."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """What a generator must know of a tokenizer's codes."""

    image_size: int
    """Side of the square images it was trained on, in pixels."""
    downsample: int
    """Pixels of a side per code of a side; of codes that are no grid, what must divide the side of an image."""
    codebook_size: int | None = None
    """Number of codes; None where codes are continuous."""
    channels: int | None = None
    """Channels of continuous codes; None where codes are discrete."""
    num_tokens: int | None = None
    """Length of codes that are no grid; None where they are one."""

    @property
    def discrete(self) -> bool:
        return self.codebook_size is not None

    def code_shape(self, image_size: int | None = None) -> tuple[int, ...]:
        """Shape of the codes of one image of this side (its own unless told): (h, w), (L,), (c, h, w) or (c, L)."""
        side = (image_size or self.image_size) // self.downsample
        places = (side, side) if self.num_tokens is None else (self.num_tokens,)
        return places if self.discrete else (self.channels or 0, *places)


class TokenizerOutput(NamedTuple):
    """What training needs of one pass: `forward(images)` of every tokenizer."""

    reconstruction: Tensor
    """[B, 3, H, W], not clamped."""
    codes: Tensor | None
    """Discrete codes [B, *places] int64; None where codes are continuous."""
    z: Tensor | None
    """[B, *places, D], encoder outputs before quantisation; None where codes are continuous."""
    losses: dict[str, Tensor]
    """The tokenizer's own terms, weighted: the quantiser's, or `kl`."""


class Tokenizer(metaclass=ABCMeta):  # not ABC, whose slots keep fully_shard from its change of class
    """Mixed into a ModelMixin: `encode`, `decode` and `spec` are the whole contract; `forward` and `last_layer` are for training."""

    @property
    @abstractmethod
    def spec(self) -> TokenizerSpec: ...

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the layer that makes pixels: where adversarial and reconstruction gradients are compared."""

    def check_image_size(self, size: int) -> None:
        """Raises UserError where images of this side cannot be encoded."""
        if size < self.spec.downsample or size % self.spec.downsample:
            raise UserError(
                f"image size {size} does not fit the tokenizer, which makes one code of {self.spec.downsample} x {self.spec.downsample} "
                f"pixels; choose a multiple of {self.spec.downsample}"
            )

    def check_images(self, images: Tensor) -> None:
        """Raises UserError where images have other channels than three, or a side that cannot be encoded."""
        if images.dim() < 4 or images.shape[1] != 3:
            raise UserError(f"images of shape {list(images.shape)}: [B, 3, H, W] is expected; convert them to RGB")
        for size in images.shape[-2:]:
            self.check_image_size(size)

    def check_codes(self, codes: Tensor) -> None:
        """Raises UserError where discrete codes lie outside the codebook, or continuous ones have other channels."""
        spec = self.spec
        if spec.codebook_size is None:
            if codes.dim() < 3 or codes.shape[1] != spec.channels:
                raise UserError(
                    f"latents of shape {list(codes.shape)}: the tokenizer's have {spec.channels} channels, [B, {spec.channels}, ...]"
                )
        elif codes.dtype.is_floating_point:
            raise UserError(f"codes are {codes.dtype}, whole numbers 0 .. {spec.codebook_size - 1} are expected")
        elif codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < spec.codebook_size:
            raise UserError(
                f"codes lie in {int(codes.min())} .. {int(codes.max())}, but the tokenizer has codes 0 .. {spec.codebook_size - 1}; "
                "they were made by another tokenizer"
            )


class ContinuousTokenizer(Tokenizer):
    """A tokenizer whose latents are standardised by channel: `encode` gives (z - mean) / std, `decode` undoes it first.

    A class registers `latent_mean` and `latent_std` in its config: one number, or one a channel. SD's scaling factor s is a std of 1 / s.
    """

    config: Any

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (what `encode` gives) and standard deviation of the latents of `images`, both standardised, each [B, c, ...].

        A latent is drawn as mean + deviation * normal. Without a posterior, as here, the deviations are zeros.
        """
        mean = self.encode(images)
        return mean, torch.zeros_like(mean)

    def standardized(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance as the network makes them -> mean and standard deviation as generators see them."""
        _, std = self._statistics(logvar)
        return self.normalize(mean), ((0.5 * logvar).exp() / std).contiguous()

    def normalize(self, z: Tensor) -> Tensor:
        """Latents as the network makes them, [B, c, ...] -> as generators see them."""
        mean, std = self._statistics(z)
        # the layout decides how a decoder's sums are rounded: latents from here and from a file must be laid out alike
        return ((z - mean) / std).contiguous()

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents as generators see them, [B, c, ...] -> as the network makes them."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> list[Tensor]:
        values = (torch.as_tensor(self.config[name], dtype=like.dtype, device=like.device) for name in ("latent_mean", "latent_std"))
        return [value.reshape(-1, *[1] * (like.dim() - 2)) for value in values]  # [c or 1, 1, ...]


def check_statistics(channels: int, **statistics: float | tuple[float, ...]) -> None:
    """Raises UserError where `latent_mean` or `latent_std` is neither one number nor one a channel, or a std is not above 0."""
    for name, value in statistics.items():
        values = [value] if isinstance(value, int | float) else list(value)
        if len(values) not in (1, channels):
            raise UserError(f"{name} has {len(values)} values; one number is expected, or one for each of the {channels} channels")
        if name == "latent_std" and min(values) <= 0:
            raise UserError(f"{name} must be above 0, got {min(values)}")


def content_hash(module: ModelMixin) -> str:
    """sha256 over the class, what its configuration sets otherwise than the defaults, and every tensor: equal hashes mean equal outputs."""
    digest = hashlib.sha256(type(module).__name__.encode())
    defaults = {name: _json(parameter.default) for name, parameter in inspect.signature(type(module).__init__).parameters.items()}
    config = {key: _json(value) for key, value in dict(module.config).items() if not key.startswith("_")}
    # without defaults, so that an option which a later version adds leaves the hashes of what was saved before it as they were
    digest.update(_json({key: value for key, value in config.items() if value != defaults.get(key)}).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def load_tokenizer(path: str | Path) -> Any:
    """Load a saved tokenizer in eval mode.

    Args:
        path: a tokenizer folder, or a pipeline folder that holds one in `tokenizer/`.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() and (folder / "tokenizer" / "config.json").is_file():
        folder = folder / "tokenizer"
    return load_component(folder, TOKENIZERS, "tokenizer").eval()


def open_tokenizer(name: str | Path, image_size: int | None) -> Any:
    """The tokenizer that a generator is trained with: a saved one, or the pixels themselves.

    Args:
        name: a folder as `load_tokenizer` takes it, `pixels` (the images) or `pixels:gray` (their luminance).
        image_size: side of the images; pixels need it, folders know their own.

    Raises:
        UserError: the folder cannot be loaded, the name is unknown, or pixels have no size.
    """
    if str(name).split(":")[0] != "pixels":
        return load_tokenizer(name)
    if str(name) not in PIXELS:
        raise UserError(f"tokenizer '{name}' is unknown; give {' or '.join(PIXELS)}, or a folder (./pixels is one)")
    if image_size is None:
        raise UserError(f"data.image_size is missing; tokenizer {name} needs the side of the images")
    defined_in = import_module(TOKENIZERS["PixelTokenizer"])
    return defined_in.PixelTokenizer(image_size=image_size, channels=PIXELS[str(name)]).eval()


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
    defined_in = import_module(registry[name])
    try:
        if name == "AutoencoderKL":  # a folder of diffusers itself
            module = defined_in.KLTokenizer.from_diffusers(folder)
        elif is_packed(folder):
            module = load_packed(getattr(defined_in, name), folder)
        else:
            module = getattr(defined_in, name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many types; whatever it is, these files cannot be used
        if isinstance(error, UserError):
            raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the {kind} cannot be loaded, its files are damaged or incomplete: {reason}") from error
    if isinstance(module, torch.nn.Module):
        missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if missing:
            raise UserError(f"{folder}: {len(missing)} tensors of the {kind} are missing, {missing[0]} first; write the folder again")
        broken = [name for name, tensor in module.state_dict().items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"{folder}: {len(broken)} tensors of the {kind} hold NaN or infinity, {broken[0]} first; "
                "take an earlier checkpoint, or import it again"
            )
    return module
