"""Convolutional encoder and decoder: VQGAN's (arXiv:2012.09841, after DDPM's U-Net) and MaskGIT's (arXiv:2202.04200), one with switches.

Shapes: images [B, 3, H, W], features [B, z_channels, h, w] with h = H / (patch 2^(levels - 1)).
Module names follow LlamaGen's checkpoints.

Where no gradient is wanted the same sums are taken in faster ways, with outputs equal up to rounding: channels last in memory, in place,
upsampling and convolution in one. `benchmarks/tokenizer_speed.py` measures it; the gains in the comments are its CPU time on one core.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.kernels.attention import attention
from genvision.layers.checkpointing import Trunk


@dataclass(frozen=True, kw_only=True)
class ConvStyle:
    """In what the networks of this family differ."""

    attention: bool
    """One-head attention behind each block of the deepest level and in the middle."""
    block_bias: bool
    """Biases of the 3x3 convolutions in residual blocks and of the encoder's first; all others always have them."""
    shortcut_of_output: bool
    """Where the width changes, the 1x1 shortcut reads the block's own output, so no path goes around it: a quirk of MaskGIT's weights."""
    pool: bool
    """Halve the resolution by 2x2 averages instead of a stride-2 convolution."""
    encoder_out_kernel: int
    """Size of the encoder's last convolution."""
    extra_decoder_block: bool
    """Decoder levels have one residual block more than encoder levels."""


VQGAN = ConvStyle(attention=True, block_bias=True, shortcut_of_output=False, pool=False, encoder_out_kernel=3, extra_decoder_block=True)
MASKGIT = ConvStyle(attention=False, block_bias=False, shortcut_of_output=True, pool=True, encoder_out_kernel=1, extra_decoder_block=False)
STYLES = {"vqgan": VQGAN, "maskgit": MASKGIT}


class _Stack(Trunk, nn.Module):
    """Levels and the blocks of the middle are what gradient checkpointing recomputes."""

    def run(self, modules: nn.ModuleList, x: Tensor) -> Tensor:
        return self.run_blocks(lambda i, x: modules[i](x), len(modules), x)


class Encoder(_Stack):
    """Images [B, 3, H, W] -> features [B, z_channels, h, w].

    Args:
        base: width at full resolution.
        multipliers: width factor of each level, the shallowest first.
        num_blocks: residual blocks a level.
        num_mid_blocks: residual blocks of the middle.
        patch: side of the pixel squares that the first convolution sees as channels (and the last one makes); 1 as published.
    """

    def __init__(
        self,
        base: int,
        multipliers: tuple[int, ...],
        num_blocks: int,
        z_channels: int,
        groups: int,
        dropout: float,
        style: ConvStyle = VQGAN,
        num_mid_blocks: int = 2,
        patch: int = 1,
    ) -> None:
        super().__init__()
        widths = [base * m for m in multipliers]
        self.patch = patch
        self.conv_in = nn.Conv2d(3 * patch**2, base, 3, padding=1, bias=style.block_bias)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            previous = widths[i - 1] if i else base
            resize = None if last else Downsample(width, pool=style.pool)
            self.conv_blocks.append(Level(previous, width, num_blocks, groups, dropout, style, attend=last, resize=resize))
        self.mid = _middle(widths[-1], num_mid_blocks, groups, dropout, style)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        kernel = style.encoder_out_kernel
        self.conv_out = nn.Conv2d(widths[-1], z_channels, kernel, padding=kernel // 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(inference_layout(F.pixel_unshuffle(images, self.patch)))
        x = self.run(self.mid, self.run(self.conv_blocks, x))
        return self.conv_out(_norm_silu(self.norm_out, x))


class Decoder(_Stack):
    """Features [B, z_channels, h, w] -> images [B, 3, H, W]; `conv_blocks.0` is the deepest level. Arguments as the encoder's."""

    def __init__(
        self,
        base: int,
        multipliers: tuple[int, ...],
        num_blocks: int,
        z_channels: int,
        groups: int,
        dropout: float,
        style: ConvStyle = VQGAN,
        num_mid_blocks: int = 2,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.patch = patch
        widths = [base * m for m in reversed(multipliers)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], num_mid_blocks, groups, dropout, style)
        self.conv_blocks = nn.ModuleList()
        num_blocks += style.extra_decoder_block
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            previous = widths[i - 1] if i else widths[0]
            resize = None if last else Upsample(width)
            self.conv_blocks.append(Level(previous, width, num_blocks, groups, dropout, style, attend=i == 0, resize=resize))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3 * patch**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.run(self.conv_blocks, self.run(self.mid, self.conv_in(inference_layout(features))))
        return F.pixel_shuffle(self.conv_out(_norm_silu(self.norm_out, x)), self.patch).contiguous()


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where `attend`, then a change of resolution."""

    def __init__(
        self,
        channels: int,
        width: int,
        num_blocks: int,
        groups: int,
        dropout: float,
        style: ConvStyle,
        *,
        attend: bool,
        resize: "Downsample | Upsample | None",
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(channels if i == 0 else width, width, groups, dropout, style) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(width, groups) for _ in range(num_blocks if attend and style.attention else 0))
        self.downsample = resize if isinstance(resize, Downsample) else nn.Identity()
        self.upsample = resize if isinstance(resize, Upsample) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def _middle(width: int, num_blocks: int, groups: int, dropout: float, style: ConvStyle) -> nn.ModuleList:
    blocks: list[nn.Module] = [ResBlock(width, width, groups, dropout, style) for _ in range(num_blocks)]
    if style.attention:
        blocks.insert(1, AttnBlock(width, groups))
    return nn.ModuleList(blocks)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with pre-activation; a 1x1 convolution on the skip where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float, style: ConvStyle) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=style.block_bias)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=style.block_bias)
        self.nin_shortcut: nn.Module = nn.Identity()
        self.shortcut_of_output = style.shortcut_of_output and channels != out_channels
        if channels != out_channels:
            read = out_channels if style.shortcut_of_output else channels
            self.nin_shortcut = nn.Conv2d(read, out_channels, 1, bias=style.block_bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(self.dropout(_norm_silu(self.norm2, h)))
        return _add(h, self.nin_shortcut(h if self.shortcut_of_output else x))


class AttnBlock(nn.Module):
    """One-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))  # each [B, 1, N, C]
        out = attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, h, w]
        return _add(self.proj_out(out), x)


class Downsample(nn.Module):
    """Halving: 2x2 averages, or a stride-2 convolution with one row and column of zeros at the bottom and right only, as released."""

    def __init__(self, channels: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = None if pool else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32:
            # the copies of a pixel share their products: 4 multiplications an output instead of 9, half the time of this layer
            return F.conv_transpose2d(x, _doubling_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _doubling_kernel(weight: Tensor) -> Tensor:
    """Kernel [I, O, 4, 4] of the transposed convolution with stride 2 that equals doubling, then convolution with `weight` [O, I, 3, 3].

    On an axis each pixel spreads over 4 outputs; two neighbouring taps add up where both copies of the pixel lie under the kernel.
    """
    spread = weight.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])  # [3, 4]
    kernel = torch.kron(spread, spread).T @ weight.flatten(2).permute(1, 2, 0)  # [I, 16, O], so in memory channels come last
    return kernel.unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def inference_layout(x: Tensor) -> Tensor:
    """Channels last on a CPU without gradients: 1.08 times as fast; training in this layout takes up to 3.5 times as long."""
    fast = x.device.type == "cpu" and not torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.channels_last) if fast else x


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    # in place no new memory is touched, which takes three quarters of the time of a large activation
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _add(new: Tensor, x: Tensor) -> Tensor:
    """Sum; without gradients in the place of `new`, which nobody else may hold."""
    return new + x if torch.is_grad_enabled() else new.add_(x)
