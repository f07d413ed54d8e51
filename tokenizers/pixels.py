"""Pixels themselves as latents: diffusion without an autoencoder (as in ADM, arXiv:2105.05233, or for digits and CIFAR-10).

Shapes: images [B, 3, H, W] in [-1, 1], latents [B, c, H, W] with c = 3 (the images) or 1 (their luminance).
"""

from typing import NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.base import ContinuousTokenizer, TokenizerSpec, check_statistics

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, ITU-R BT.601: those of PIL's mode "L"."""


class PixelTokenizer(ContinuousTokenizer, ModelMixin, ConfigMixin):
    """Images to standardised pixels and back; there is nothing to train, and with three channels nothing is lost.

    Args:
        image_size: side of the images; others work too.
        channels: 3 keeps the images, 1 their luminance, which `decode` puts into three equal channels.
        latent_mean: `encode` takes it off; one number, or one a channel.
        latent_std: `encode` divides by it; one number, or one a channel.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_std: float | tuple[float, ...] = 1.0,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise UserError(f"channels is {channels}; 3 keeps the images, 1 their luminance")
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        check_statistics(channels, latent_mean=latent_mean, latent_std=latent_std)
        self._spec = TokenizerSpec(image_size=image_size, downsample=1, channels=channels)
        # the only tensor: it gives the module a device and a dtype, and its file something to hold, with three channels, too
        self.luminance: Tensor
        self.register_buffer("luminance", torch.tensor(LUMINANCE))

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def last_layer(self) -> NoReturn:
        raise UserError(UNTRAINABLE)

    def forward(self, images: Tensor) -> NoReturn:
        raise UserError(UNTRAINABLE)

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> standardised pixels [B, c, H, W]."""
        self.check_images(images)
        if images.dim() != 4:
            raise UserError(f"images of shape {list(images.shape)}: [B, 3, H, W] is expected")
        pixels = images.to(self.dtype)
        if self.spec.channels == 1:
            pixels = (pixels * self.luminance[:, None, None]).sum(1, keepdim=True)
        return self.normalize(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised pixels [B, c, H, W] -> images [B, 3, H, W], not clamped."""
        self.check_codes(latents)
        if latents.dim() != 4:
            raise UserError(f"latents of shape {list(latents.shape)}: [B, {self.spec.channels}, H, W] is expected")
        return self.denormalize(latents.to(self.dtype)).repeat(1, 3 // latents.shape[1], 1, 1)


UNTRAINABLE = "pixels have no weights, so a PixelTokenizer cannot be trained; train a generator with --tokenizer pixels"
