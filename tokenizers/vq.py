"""Convolutional VQ tokenizers: VQGAN (arXiv:2012.09841 section 3.1), LlamaGen's with unit codes (arXiv:2406.06525 section 3.1),
MaskGIT's (arXiv:2202.04200) and MAGE's (arXiv:2211.09117).

Shapes: images [B, 3, H, W] in [-1, 1], codes [B, h, w] with h = H / downsample, D codebook dimension.
Module names follow LlamaGen's checkpoints.
"""

from typing import Any, Literal

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.base import Tokenizer, TokenizerOutput, TokenizerSpec
from genvision.tokenizers.conv import STYLES, Decoder, Encoder
from genvision.tokenizers.quantizers import make_quantizer


class VQTokenizer(Tokenizer, ModelMixin, ConfigMixin):
    """Images to a grid of codebook indices and back.

    Args:
        image_size: side of the training images; others work too if `downsample` divides them.
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        quantizer: vq, simvq, ibq, fsq, lfq or bsq, see genvision.tokenizers.quantizers; the next four options are those of vq.
        quantizer_options: further options of the quantiser: {update: ema} or {gradient: rotation} of vq, {levels: [8, 5, 5, 5]} of fsq, ...
        codebook_l2_norm: compare unit vectors.
        commitment_beta: weight of the commitment loss, which moves the encoder.
        codebook_weight: weight of the codebook loss, which moves the codes. (The released VQGANs have 1 and 0.25 the other way round.)
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        base_channels: width at full resolution.
        encoder_multipliers: width factor of each level; one level fewer than that many halvings of the resolution.
        decoder_multipliers: the same for the decoder; None takes the encoder's.
        num_res_blocks: residual blocks an encoder level (a decoder of VQGAN's style has one more).
        z_channels: width between encoder and quantiser.
        norm_groups: groups of every GroupNorm.
        dropout: inside residual blocks.
        style: of the networks: vqgan, or maskgit without attention and with few biases; see genvision.tokenizers.conv.
        num_mid_blocks: residual blocks of the middle.
        use_quant_conv: 1x1 convolutions between z_channels and codebook_dim; without them both are one number.
        unit_range: the networks see images in [0, 1]; outside they are in [-1, 1] as everywhere.
        patch_size: side of the pixel squares that the networks see as channels: less work for small machines; 1 as published.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Level",)
    _replicated_modules = ("quantize", "decoder.conv_out")

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        quantizer: Literal["vq", "simvq", "ibq", "fsq", "lfq", "bsq"] = "vq",
        quantizer_options: dict[str, Any] | None = None,
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
        style: Literal["vqgan", "maskgit"] = "vqgan",
        num_mid_blocks: int = 2,
        use_quant_conv: bool = True,
        unit_range: bool = False,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        decoder_multipliers = decoder_multipliers or encoder_multipliers
        sizes = {"codebook_size": codebook_size, "codebook_dim": codebook_dim, "base_channels": base_channels, "z_channels": z_channels}
        for name, value in (
            sizes
            | {"num_res_blocks": num_res_blocks, "num_mid_blocks": num_mid_blocks, "norm_groups": norm_groups, "patch_size": patch_size}
        ).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        widths = [base_channels * multiplier for multiplier in (1, *encoder_multipliers, *decoder_multipliers)]
        if any(width < 1 or width % norm_groups for width in widths):
            raise UserError(f"norm_groups {norm_groups} must divide every width, but they are {sorted(set(widths))}")
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout must lie in 0 .. 1, got {dropout}")
        if style not in STYLES:
            raise UserError(f"style '{style}' is unknown; choose one of {', '.join(STYLES)}")
        if not use_quant_conv and z_channels != codebook_dim:
            raise UserError(f"without quant_conv z_channels {z_channels} must equal codebook_dim {codebook_dim}")
        rest = (num_res_blocks, z_channels, norm_groups, dropout, STYLES[style], num_mid_blocks, patch_size)
        self.encoder = Encoder(base_channels, encoder_multipliers, *rest)
        self.decoder = Decoder(base_channels, decoder_multipliers, *rest)
        options = dict(quantizer_options or {})
        if quantizer == "vq":
            options |= {"l2_norm": codebook_l2_norm, "commitment_beta": commitment_beta}
            options |= {"codebook_weight": codebook_weight, "entropy_weight": entropy_weight}
        self.quantize = make_quantizer(quantizer, codebook_size, codebook_dim, options)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1) if use_quant_conv else nn.Identity()
        downsample = patch_size * 2 ** (len(encoder_multipliers) - 1)
        self._spec = TokenizerSpec(image_size=image_size, downsample=downsample, codebook_size=codebook_size)

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
        if self.config.unit_range:
            images = (images + 1) / 2
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, h, w, D] -> images [B, 3, H, W]."""
        vectors = vectors.to(self.last_layer.dtype)
        images: Tensor = self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return 2 * images - 1 if self.config.unit_range else images

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct [B, 3, H, W] with the quantiser's training losses."""
        z = self.encode_continuous(images)
        quantized = self.quantize(z)
        return TokenizerOutput(self.decode_vectors(quantized.quantized), quantized.codes, z, quantized.losses)
