"""KL autoencoder: the tokenizer of Stable Diffusion (arXiv:2112.10752 section 3.1) around diffusers' AutoencoderKL.

Shapes: images [B, 3, H, W] in [-1, 1], latents [B, c, h, w] with h = H / downsample.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.base import ContinuousTokenizer, TokenizerOutput, TokenizerSpec, check_statistics

if TYPE_CHECKING:  # importing it takes seconds, so that happens where one is made
    from diffusers import AutoencoderKL


class KLTokenizer(ContinuousTokenizer, ModelMixin, ConfigMixin):
    """Images to a grid of continuous latents and back; the defaults are SD's f8 network with latents as they come.

    Args:
        image_size: side of the training images; others work too if `downsample` divides them.
        block_out_channels: width of each level, full resolution first; one level fewer than that many halvings.
        layers_per_block: residual blocks an encoder level (the decoder has one more).
        latent_channels: c.
        norm_num_groups: groups of every GroupNorm.
        act_fn: activation by diffusers' name.
        attention_levels: levels, 0 at full resolution, with attention after each of their residual blocks, in encoder and decoder.
        mid_block_add_attention: attention between the two residual blocks at the lowest resolution.
        use_quant_conv: a 1x1 convolution makes mean and log-variance out of the encoder's output.
        use_post_quant_conv: a 1x1 convolution before the decoder.
        latent_mean: `encode` takes it off; one number, or one a channel. SD's shift.
        latent_std: `encode` divides by it; one number, or one a channel. SD's scaling factor s is 1 / s here.
        kl_weight: weight of the KL term of training, which is SUMMED over c, h, w and averaged over images. SD sums the reconstruction
            error over pixels, too: beside a MEAN error the same number weighs 3 * H * W times as much (1e-6 at 256 pixels does what 4e-3
            would on a mean KL, ViTok has 1e-3 there); 1e-6 / (3 * H * W) gives SD's balance.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DownEncoderBlock2D", "UNetMidBlock2D", "UpDecoderBlock2D")
    _replicated_modules = ("autoencoder.decoder.conv_out",)
    autoencoder: "AutoencoderKL"

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        attention_levels: tuple[int, ...] = (),
        mid_block_add_attention: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_std: float | tuple[float, ...] = 1.0,
        kl_weight: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {"layers_per_block": layers_per_block, "latent_channels": latent_channels, "norm_num_groups": norm_num_groups}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not block_out_channels or any(width < 1 or width % norm_num_groups for width in block_out_channels):
            raise UserError(f"block_out_channels {list(block_out_channels)} must be multiples of norm_num_groups, {norm_num_groups}")
        levels = range(len(block_out_channels))
        if not set(attention_levels) <= set(levels):
            raise UserError(f"attention_levels {list(attention_levels)} must lie in 0 .. {levels[-1]}, as there are {len(levels)} widths")
        if kl_weight < 0:
            raise UserError(f"kl_weight must be 0 or more, got {kl_weight}")
        check_statistics(latent_channels, latent_mean=latent_mean, latent_std=latent_std)
        self._spec = TokenizerSpec(image_size=image_size, downsample=2 ** levels[-1], channels=latent_channels)
        self.check_image_size(image_size)

        from diffusers import AutoencoderKL

        try:
            self.autoencoder = AutoencoderKL(
                down_block_types=tuple(DOWN_BLOCKS[level in attention_levels] for level in levels),
                up_block_types=tuple(UP_BLOCKS[level in attention_levels] for level in reversed(levels)),
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                act_fn=act_fn,
                latent_channels=latent_channels,
                norm_num_groups=norm_num_groups,
                sample_size=image_size,
                use_quant_conv=use_quant_conv,
                use_post_quant_conv=use_post_quant_conv,
                mid_block_add_attention=mid_block_add_attention,
            )
        except ValueError as error:  # the activation is looked up there
            raise UserError(f"act_fn '{act_fn}': diffusers' AutoencoderKL cannot be made ({error}); silu is usual") from error

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def last_layer(self) -> Tensor:
        return self.autoencoder.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the posterior's mode, standardised, [B, c, h, w]."""
        mean, _ = self.moments(images)
        return self.normalize(mean)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> mean and standard deviation of the posterior, both standardised, each [B, c, h, w]."""
        return self.standardized(*self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents [B, c, h, w] -> images [B, 3, H, W], about [-1, 1] but not clamped."""
        self.check_codes(latents)
        if latents.dim() != 4:
            raise UserError(f"latents of shape {list(latents.shape)}: [B, {self.spec.channels}, h, w] is expected")
        return self._decode(self.denormalize(latents))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> mean and log-variance (in [-30, 20]) of the posterior, each [B, c, h, w] and not standardised."""
        self.check_images(images)
        if images.dim() != 4:
            raise UserError(f"images of shape {list(images.shape)}: [B, 3, H, W] is expected")
        posterior = self.autoencoder.encode(images.to(self.last_layer.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct [B, 3, H, W] from a sample of the posterior, in eval mode from its mode; the loss is `kl`, see `kl_weight`."""
        mean, logvar = self.moments(images)
        z = mean
        if self.training:  # by shape: randn_like would draw in the order of memory, which the device chooses
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        m, v = mean.float(), logvar.float()
        kl = 0.5 * (m.square() + v.exp() - 1 - v).flatten(1).sum(1).mean()
        return TokenizerOutput(self._decode(z), None, None, {"kl": self.config.kl_weight * kl})

    def _decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(z.to(self.last_layer.dtype)).sample
        return images

    @classmethod
    def from_diffusers(cls, folder: str | Path, *, image_size: int | None = None) -> "KLTokenizer":
        """Load a folder of diffusers' AutoencoderKL (config.json and safetensors) in float32, with the latent statistics it names.

        Files of early diffusers versions, which call the attention query, key, value and proj_attn, are read, too.

        Args:
            folder: on this machine; of a pipeline, its `vae` folder.
            image_size: of the spec; None takes the folder's `sample_size`.

        Raises:
            UserError: the folder is missing, damaged or incomplete, or holds another network.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json here; give the folder of an AutoencoderKL (in a diffusers pipeline, `vae`)")

        from diffusers import AutoencoderKL

        try:
            autoencoder, report = AutoencoderKL.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # diffusers and safetensors raise many types; whatever it is, these files cannot be used
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: cannot be loaded as diffusers' AutoencoderKL in safetensors: {reason}") from error
        problems = [f"{kind} {name}" for kind in ("missing", "unexpected") for name in sorted(report[f"{kind}_keys"])]
        problems += [f"not finite {name}" for name, tensor in autoencoder.state_dict().items() if not problems and not finite(tensor)]
        if problems:
            raise UserError(f"{folder}: {len(problems)} tensors do not fit its config.json: {'; '.join(problems[:5])}; fetch it again")
        arguments = from_diffusers_config(autoencoder.config)
        if image_size is not None:
            arguments["image_size"] = image_size
        with torch.device("meta"):  # a second set of weights would cost time and memory
            tokenizer = cls(**arguments)
        tokenizer.autoencoder = autoencoder
        return tokenizer.eval()

    def to_diffusers(self, folder: str | Path) -> None:
        """Write a folder that diffusers' `AutoencoderKL.from_pretrained` loads.

        One mean and one std become `shift_factor` and `scaling_factor`; statistics by channel become `latents_mean` and `latents_std`
        with a `scaling_factor` of 1.
        """
        channels = self.config.latent_channels
        mean, std = _as_list(self.config.latent_mean, channels), _as_list(self.config.latent_std, channels)
        if len(set(mean)) == len(set(std)) == 1:
            facts: dict[str, Any] = {
                "scaling_factor": 1 / std[0],
                "shift_factor": mean[0] or None,
                "latents_mean": None,
                "latents_std": None,
            }
        else:
            facts = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": mean, "latents_std": std}
        self.autoencoder.register_to_config(**facts, sample_size=self.config.image_size)
        self.autoencoder.save_pretrained(str(folder))


DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""diffusers' names of a level without and with attention."""


def from_diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of KLTokenizer for a config of diffusers' AutoencoderKL; what is left out has diffusers' default.

    diffusers standardises latents to (z - shift) * scale, or (z - latents_mean) * scale / latents_std where statistics by channel exist.

    Raises:
        UserError: images have other channels than three, or the levels are of another kind than here.
    """
    for name in ("in_channels", "out_channels"):
        if config.get(name, 3) != 3:
            raise UserError(f"{name} is {config[name]}; only autoencoders of images with 3 channels are supported")
    widths = tuple(config.get("block_out_channels", (64,)))
    size = config.get("sample_size", 32)
    scale = config.get("scaling_factor", 0.18215)
    by_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
    mean: float | tuple[float, ...] = tuple(config["latents_mean"]) if by_channel else config.get("shift_factor") or 0.0
    std: float | tuple[float, ...] = tuple(value / scale for value in config["latents_std"]) if by_channel else 1 / scale
    defaults = {
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    return {
        "image_size": min(size) if isinstance(size, list | tuple) else size,
        "block_out_channels": widths,
        "attention_levels": _attention_levels(config, len(widths)),
        "latent_mean": mean,
        "latent_std": std,
        **{name: config.get(name, default) for name, default in defaults.items()},
    }


def finite(tensor: Tensor) -> bool:
    """No NaN or infinity among its numbers."""
    return bool(tensor.isfinite().all())


def _attention_levels(config: Mapping[str, Any], num_levels: int) -> tuple[int, ...]:
    down = list(config.get("down_block_types") or DOWN_BLOCKS[:1] * num_levels)
    up = list(config.get("up_block_types") or UP_BLOCKS[:1] * num_levels)
    levels = tuple(level for level, kind in enumerate(down) if kind == DOWN_BLOCKS[1])
    if down != [DOWN_BLOCKS[level in levels] for level in range(num_levels)]:
        raise UserError(f"down_block_types {down}: {num_levels} of {' or '.join(DOWN_BLOCKS)} are expected, one for each width")
    if up != [UP_BLOCKS[level in levels] for level in reversed(range(num_levels))]:
        raise UserError(
            f"up_block_types {up}: {' or '.join(UP_BLOCKS)} are expected, with attention on the levels where the encoder has it"
        )
    return levels


def _as_list(value: float | tuple[float, ...], channels: int) -> list[float]:
    values = [value] if isinstance(value, int | float) else list(value)
    return values * channels if len(values) == 1 else values
