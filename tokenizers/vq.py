"""Convolutional VQ tokenizer: VQGAN (arXiv:2012.09841 section 3.1) and LlamaGen's with unit codes (arXiv:2406.06525 section 3.1).

Shapes: images [B, 3, H, W] in [-1, 1], codes [B, h, w] with h = H / downsample, D codebook dimension.
Module names follow LlamaGen's checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.kernels.attention import attention
from genvision.tokenizers.base import Tokenizer, TokenizerOutput, TokenizerSpec
from genvision.tokenizers.quantizers import VectorQuantizer


class VQTokenizer(Tokenizer, ModelMixin, ConfigMixin):
    """Images to a grid of codebook indices and back.

    Args:
        image_size: side of the training images; others work too if `downsample` divides them.
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        codebook_l2_norm: compare unit vectors.
        commitment_beta: weight of the commitment loss, which moves the encoder.
        codebook_weight: weight of the codebook loss, which moves the codes. (The released VQGANs have 1 and 0.25 the other way round.)
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        base_channels: width at full resolution.
        encoder_multipliers: width factor of each level; one level fewer than that many halvings of the resolution.
        decoder_multipliers: the same for the decoder; None takes the encoder's.
        num_res_blocks: residual blocks an encoder level (the decoder has one more).
        z_channels: width between encoder and quantiser.
        norm_groups: groups of every GroupNorm.
        dropout: inside residual blocks.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        codebook_l2_norm: bool = True,
        commitment_beta: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        base_channels: int = 128,
        encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        decoder_multipliers: tuple[int, ...] | None = None,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        decoder_multipliers = decoder_multipliers or encoder_multipliers
        sizes = {"codebook_size": codebook_size, "codebook_dim": codebook_dim, "base_channels": base_channels, "z_channels": z_channels}
        for name, value in (sizes | {"num_res_blocks": num_res_blocks, "norm_groups": norm_groups}).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        widths = [base_channels * multiplier for multiplier in (1, *encoder_multipliers, *decoder_multipliers)]
        if any(width < 1 or width % norm_groups for width in widths):
            raise UserError(f"norm_groups {norm_groups} must divide every width, but they are {sorted(set(widths))}")
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout must lie in 0 .. 1, got {dropout}")
        self.encoder = Encoder(base_channels, encoder_multipliers, num_res_blocks, z_channels, norm_groups, dropout)
        self.decoder = Decoder(base_channels, decoder_multipliers, num_res_blocks, z_channels, norm_groups, dropout)
        self.quantize = VectorQuantizer(
            codebook_size,
            codebook_dim,
            l2_norm=codebook_l2_norm,
            commitment_beta=commitment_beta,
            codebook_weight=codebook_weight,
            entropy_weight=entropy_weight,
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self._spec = TokenizerSpec(image_size=image_size, downsample=2 ** (len(encoder_multipliers) - 1), codebook_size=codebook_size)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, h, w] int64."""
        self.check_images(images)
        return self.quantize.nearest(self.encode_continuous(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> images [B, 3, H, W], about [-1, 1] but not clamped."""
        self.check_codes(codes)
        return self.decode_vectors(self.quantize.look_up(codes))

    def encode_continuous(self, images: Tensor) -> Tensor:
        """Encoder outputs before quantisation, [B, h, w, D]."""
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, h, w, D] -> images [B, 3, H, W]."""
        vectors = vectors.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct [B, 3, H, W] with the quantiser's training losses."""
        z = self.encode_continuous(images)
        quantized = self.quantize(z)
        return TokenizerOutput(self.decode_vectors(quantized.quantized), quantized.codes, z, quantized.losses)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with pre-activation; a 1x1 convolution on the skip where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


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
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Stride-2 convolution; one row and column of zeros at the bottom and right only, as in the official weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where `attend`, then a change of resolution."""

    def __init__(
        self, channels: int, width: int, num_blocks: int, groups: int, dropout: float, *, attend: bool, resize: Downsample | Upsample | None
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(channels if i == 0 else width, width, groups, dropout) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(width, groups) for _ in range(num_blocks if attend else 0))
        self.downsample = resize if isinstance(resize, Downsample) else nn.Identity()
        self.upsample = resize if isinstance(resize, Upsample) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def _middle(width: int, groups: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(width, width, groups, dropout), AttnBlock(width, groups), ResBlock(width, width, groups, dropout)])


class _Stack(nn.Module):
    """Levels and middle share the switch for gradient checkpointing."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin.enable_gradient_checkpointing

    def run(self, modules: nn.ModuleList, x: Tensor) -> Tensor:
        for module in modules:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(module, x)
            else:
                x = module(x)
        return x


class Encoder(_Stack):
    """Images [B, 3, H, W] -> features [B, z_channels, h, w]."""

    def __init__(self, base: int, multipliers: tuple[int, ...], num_blocks: int, z_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        widths = [base * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            previous = widths[i - 1] if i else base
            self.conv_blocks.append(
                Level(previous, width, num_blocks, groups, dropout, attend=last, resize=None if last else Downsample(width))
            )
        self.mid = _middle(widths[-1], groups, dropout)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.run(self.mid, self.run(self.conv_blocks, self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(_Stack):
    """Features [B, z_channels, h, w] -> images [B, 3, H, W]; `conv_blocks.0` is the deepest level."""

    def __init__(self, base: int, multipliers: tuple[int, ...], num_blocks: int, z_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        widths = [base * m for m in reversed(multipliers)]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], groups, dropout)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            previous = widths[i - 1] if i else widths[0]
            resize = None if last else Upsample(width)
            self.conv_blocks.append(Level(previous, width, num_blocks + 1, groups, dropout, attend=i == 0, resize=resize))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.run(self.conv_blocks, self.run(self.mid, self.conv_in(features)))
        return self.conv_out(F.silu(self.norm_out(x)))
