"""Discriminators of tokenizer training: they tell images from reconstructions.

PatchGAN (pix2pix, arXiv:1611.07004 section 3.2.2; as VQGAN uses it, arXiv:2012.09841) gives a logit a patch, the residual one of StyleGAN
(arXiv:1912.04958; as ViTok, arXiv:2501.09755, and LlamaGen, arXiv:2406.06525, use it) a logit an image.

Shapes: B images [B, 3, H, W] in [-1, 1], C channels of a feature map, h, w its sides. Module names follow the official checkpoints.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError

Output = Tensor | tuple[Tensor, list[Tensor]]
SLOPE = 0.2
"""Of every LeakyReLU."""
LAST_SIDE = 4
"""Pixels of a side where the residual discriminator stops halving."""


def make_discriminator(
    kind: Literal["patchgan", "stylegan"], image_size: int, width: int, num_layers: int, *, blur: Literal["1331", "121"] = "1331"
) -> nn.Module:
    """A discriminator for square images; `forward(images, return_features=False)`.

    Args:
        kind: `patchgan` or `stylegan`.
        image_size: side of the images in pixels.
        width: of `patchgan`, channels of the first layer (64 is official); of `stylegan`, those of its deepest layers (512 is official).
        num_layers: of `patchgan`, halvings of the resolution (3 is official); `stylegan` halves down to 4 x 4 pixels whatever it says.
        blur: of `stylegan`, see `StyleGANDiscriminator`.

    Raises:
        UserError: a name is unknown, a number is below 1, or the images are too small or no power of two where one is needed.
    """
    if kind not in ("patchgan", "stylegan"):
        raise UserError(f"discriminator '{kind}' is unknown; choose patchgan or stylegan")
    for name, value in {"width": width, "num_layers": num_layers}.items():
        if value < 1:
            raise UserError(f"{name} of the discriminator must be at least 1, got {value}")
    if kind == "stylegan":
        return StyleGANDiscriminator(stylegan_channels(image_size, width), blur=blur)
    discriminator = PatchGAN(width, num_layers)
    discriminator.check_size(image_size, image_size)
    return discriminator


class PatchGAN(nn.Module):
    """A logit for each overlapping patch, [B, 1, h, w] with h = H / 2^num_layers - 2.

    BatchNorm counts each process's images alone, and in train mode its running statistics move with every forward pass.

    Args:
        width: channels of the first layer; they double from layer to layer up to eightfold.
        num_layers: convolutions of stride 2, the first one included.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        self.min_side = 3 * 2**num_layers
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        channels = width
        for i in range(1, num_layers + 1):
            previous, channels = channels, width * min(2**i, 8)
            # BatchNorm follows, so no bias
            layers.append(nn.Conv2d(previous, channels, 4, stride=2 if i < num_layers else 1, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE)]
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_patchgan)

    def forward(self, images: Tensor, return_features: bool = False) -> Output:
        """Logits [B, 1, h, w]; with features, also the map [B, C, h, w] behind each of the `num_layers + 1` activations.

        Raises:
            UserError: the images are too small for a single patch.
        """
        self.check_size(*images.shape[-2:])
        x, features = images, []
        for layer in self.main:
            x = layer(x)
            if return_features and isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return (x, features) if return_features else x

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where not one patch fits."""
        if min(height, width) < self.min_side:
            raise UserError(
                f"a patchgan discriminator of this depth needs images of at least {self.min_side}x{self.min_side} pixels, "
                f"got {height}x{width}; take a smaller num_layers (each halves the size that is needed)"
            )


def stylegan_channels(image_size: int, width: int = 512) -> dict[int, int]:
    """Channels at each side of the feature maps, image_size .. 4: `width` up to 32 pixels, half as many at each doubling above.

    Raises:
        UserError: the image size is no power of two, or smaller than 8.
    """
    if image_size < 2 * LAST_SIDE or image_size & (image_size - 1):
        raise UserError(
            f"a stylegan discriminator needs an image size that is a power of two, at least 8, got {image_size}; "
            "change the image size, or take patchgan"
        )
    sides = [LAST_SIDE]
    while sides[-1] < image_size:
        sides.append(2 * sides[-1])
    return {side: max(1, width * 32 // max(side, 32)) for side in sides}


class StyleGANDiscriminator(nn.Module):
    """A logit for each image, [B, 1], from residual blocks that halve the resolution down to 4 x 4 pixels; without minibatch deviation.

    Args:
        channels: side of a feature map to its channels, from the images' side down to 4, as `stylegan_channels` gives them.
        blur: `1331` blurs with [1, 3, 3, 1] and halves the side, between a block's convolutions and on its skip (ViTok);
            `121` blurs with [1, 2, 1], then has a third convolution, of stride 2, and on the skip a 1x1 one of stride 2 (LlamaGen).
    """

    def __init__(self, channels: Mapping[int, int], *, blur: Literal["1331", "121"] = "1331") -> None:
        super().__init__()
        blocks: dict[str, type[BlurPoolBlock | BlurConvBlock]] = {"1331": BlurPoolBlock, "121": BlurConvBlock}
        if blur not in blocks:
            raise UserError(f"blur '{blur}' of the discriminator is unknown; choose 1331 or 121")
        sides = sorted(channels, reverse=True)
        assert sides == [LAST_SIDE * 2**i for i in reversed(range(len(sides)))], f"sides must halve down to {LAST_SIDE}, got {sides}"
        self.image_size = sides[0]
        widths = [channels[side] for side in sides]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1)
        self.res_blocks = nn.ModuleList(blocks[blur](widths[i], widths[i + 1]) for i in range(len(widths) - 1))
        self.conv_last = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.fc1 = nn.Linear(widths[-1] * LAST_SIDE**2, widths[-1])
        self.fc2 = nn.Linear(widths[-1], 1)
        self.apply(_init_stylegan)

    def forward(self, images: Tensor, return_features: bool = False) -> Output:
        """Logits [B, 1]; with features, also the maps [B, C, h, w] of the first layer, each block and the last convolution.

        Raises:
            UserError: the images have another size than the discriminator was made for.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            got = "x".join(map(str, images.shape[-2:]))
            raise UserError(
                f"this stylegan discriminator takes images of {self.image_size}x{self.image_size} pixels, got {got}; make one for that size"
            )
        x = _leaky(self.conv1(images))
        features = [x]
        for block in self.res_blocks:
            x = block(x)
            features.append(x)
        x = _leaky(self.conv_last(x))
        features.append(x)
        logits = self.fc2(_leaky(self.fc1(x.flatten(1))))
        return (logits, features) if return_features else logits


class BlurPoolBlock(nn.Module):
    """[B, C, h, w] -> [B, C', h/2, w/2]; convolution, blur and halving, convolution; the skip is halved likewise."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.res_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.blur_pool = Blur((1, 3, 3, 1), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.res_conv(self.blur_pool(x))
        h = self.blur_pool(_leaky(self.conv1(x)))
        return (skip + _leaky(self.conv2(h))) / 2**0.5


class BlurConvBlock(nn.Module):
    """[B, C, h, w] -> [B, C', h/2, w/2]; two convolutions, then blur (mirrored at the border) and a convolution of stride 2."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.res_conv = nn.Conv2d(channels, out_channels, 1, stride=2)
        self.blur_pool = Blur((1, 2, 1), stride=1, pad_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        h = _leaky(self.conv2(_leaky(self.conv1(x))))
        return (self.res_conv(x) + self.conv3(self.blur_pool(h))) / 2**0.5


class Blur(nn.Module):
    """Each channel convolved with the outer product of a kernel with itself, which sums to 1; a border of one pixel is added first."""

    filter: Tensor

    def __init__(self, kernel: tuple[int, ...], stride: int, pad_mode: str = "constant") -> None:
        super().__init__()
        self.stride, self.pad_mode = stride, pad_mode
        row = torch.tensor(kernel, dtype=torch.float32) / sum(kernel)
        self.register_buffer("filter", torch.outer(row, row)[None, None])  # [1, 1, k, k]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=self.pad_mode), weight, stride=self.stride, groups=x.shape[1])


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def _init_patchgan(module: nn.Module) -> None:
    """As pix2pix does; biases of convolutions keep PyTorch's start."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _init_stylegan(module: nn.Module) -> None:
    """Kaiming's start for the slope of the activations, which keeps the variance from layer to layer as StyleGAN's scaled layers do."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
