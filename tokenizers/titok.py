"""TiTok: an image as a short sequence of tokens that is no grid (arXiv:2406.07550 section 3.2; VAE latents after arXiv:2501.07730).

Shapes: images [B, 3, H, W] in [-1, 1]; N = h w patches, L latent tokens, C width of a transformer, D width of a token;
codes [B, L], latents [B, D, L]. The networks themselves see and make images in [0, 1].
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.kernels.attention import attention
from genvision.layers.checkpointing import Trunk
from genvision.tokenizers.base import ContinuousTokenizer, TokenizerOutput, TokenizerSpec, check_statistics
from genvision.tokenizers.conv import MASKGIT, Decoder
from genvision.tokenizers.quantizers import VectorQuantizer


class TiTok(ContinuousTokenizer, ModelMixin, ConfigMixin):
    """Images to a sequence of codebook indices, or of latents, and back.

    Args:
        image_size: side of the images; the position table allows no other.
        patch_size: side of a patch in pixels.
        num_latent_tokens: L, tokens an image becomes.
        token_dim: D, channels of a code or latent.
        quantize_mode: "vq" for indices, "vae" for latents.
        codebook_size: number of codes (this and the next four only for "vq").
        codebook_l2_norm: compare unit vectors.
        commitment_beta: weight of the commitment loss, which moves the encoder.
        codebook_weight: weight of the codebook loss, which moves the codes.
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        kl_weight: weight of the KL divergence, summed over tokens and channels ("vae"; the released models' loss has it beside
            the mean squared error of images in [0, 1], a quarter of that in [-1, 1]).
        latent_mean: of the latents, one number or one a channel ("vae").
        latent_std: the same.
        encoder_dim: C of the encoder; `encoder_depth` blocks of `encoder_heads` heads.
        decoder_dim: C of the decoder; `decoder_depth` blocks of `decoder_heads` heads.
        is_legacy: the first release: latent tokens and channels are scrambled before the quantiser, and the decoder predicts the codes of
            a MaskGIT-VQGAN whose decoder makes the pixels. Only with "vq"; the arguments below belong to that decoder.
        pixel_codebook_size: codes of the pixel decoder.
        pixel_codebook_dim: their width.
        pixel_base_channels: width at full resolution.
        pixel_multipliers: width factor of each level, the shallowest first; 2 ^ (levels - 1) must be `patch_size`.
        pixel_num_res_blocks: residual blocks a level.
        pixel_norm_groups: groups of every GroupNorm.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _replicated_modules = ("quantize", "head")

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 64,
        token_dim: int = 12,
        quantize_mode: str = "vq",
        codebook_size: int = 4096,
        codebook_l2_norm: bool = True,
        commitment_beta: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        kl_weight: float = 1e-6,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_std: float | tuple[float, ...] = 1.0,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        is_legacy: bool = False,
        pixel_codebook_size: int = 1024,
        pixel_codebook_dim: int = 256,
        pixel_base_channels: int = 128,
        pixel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        pixel_num_res_blocks: int = 2,
        pixel_norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if quantize_mode not in ("vq", "vae"):
            raise UserError(f"quantize_mode '{quantize_mode}' is unknown; it is 'vq' for indices or 'vae' for latents")
        if is_legacy and quantize_mode != "vq":
            raise UserError(f"is_legacy has no quantize_mode '{quantize_mode}'; set is_legacy to false, or quantize_mode to vq")
        sizes = {"patch_size": patch_size, "num_latent_tokens": num_latent_tokens, "token_dim": token_dim, "codebook_size": codebook_size}
        for name, value in (sizes | {"encoder_depth": encoder_depth, "decoder_depth": decoder_depth}).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if image_size < 1 or image_size % patch_size:
            raise UserError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
        for side, dim, heads in (("encoder", encoder_dim, encoder_heads), ("decoder", decoder_dim, decoder_heads)):
            if heads < 1 or dim < 1 or dim % heads:
                raise UserError(f"{side}_heads {heads} must divide {side}_dim {dim}")

        discrete, num_patches = quantize_mode == "vq", (image_size // patch_size) ** 2
        out_dim = token_dim if discrete else 2 * token_dim
        self.encoder = TiTokEncoder(
            patch_size, num_patches, num_latent_tokens, encoder_dim, encoder_depth, encoder_heads, out_dim=out_dim, is_legacy=is_legacy
        )
        self.decoder = TiTokDecoder(token_dim, num_patches, num_latent_tokens, decoder_dim, decoder_depth, decoder_heads)
        self.head: PatchHead | CodebookHead
        if is_legacy:
            multipliers, groups = tuple(pixel_multipliers), pixel_norm_groups
            if 2 ** (len(multipliers) - 1) != patch_size:
                raise UserError(f"pixel_multipliers {list(multipliers)} enlarge by 2 ^ (levels - 1), which must be patch_size {patch_size}")
            widths = [pixel_base_channels * multiplier for multiplier in multipliers]
            if groups < 1 or any(width < 1 or width % groups for width in widths):
                raise UserError(
                    f"pixel_norm_groups {groups} must divide every width of the pixel decoder, but they are {sorted(set(widths))}"
                )
            pixel_decoder = Decoder(pixel_base_channels, multipliers, pixel_num_res_blocks, pixel_codebook_dim, groups, 0.0, MASKGIT)
            self.head = CodebookHead(decoder_dim, pixel_codebook_size, pixel_codebook_dim, pixel_decoder)
        else:
            self.head = PatchHead(decoder_dim, patch_size)
        if discrete:
            self.quantize = VectorQuantizer(
                codebook_size,
                token_dim,
                l2_norm=codebook_l2_norm,
                commitment_beta=commitment_beta,
                codebook_weight=codebook_weight,
                entropy_weight=entropy_weight,
            )
        else:
            if kl_weight < 0:
                raise UserError(f"kl_weight must be 0 or more, got {kl_weight}")
            check_statistics(token_dim, latent_mean=latent_mean, latent_std=latent_std)
        self._spec = TokenizerSpec(
            image_size=image_size,
            downsample=patch_size,
            codebook_size=codebook_size if discrete else None,
            channels=None if discrete else token_dim,
            num_tokens=num_latent_tokens,
        )

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def last_layer(self) -> Tensor:
        return self.head.last_layer

    def check_image_size(self, size: int) -> None:
        """Raises UserError where images of this side cannot be encoded: all but one."""
        if size != self.spec.image_size:
            raise UserError(
                f"image size {size} does not fit the tokenizer, whose position table is for {self.spec.image_size} x "
                f"{self.spec.image_size} pixels; resize and crop the images to that"
            )

    def check_codes(self, codes: Tensor) -> None:
        """Raises UserError where codes [B, L] or latents [B, D, L] have other values, channels or lengths."""
        super().check_codes(codes)
        shape = self.spec.code_shape()
        if tuple(codes.shape[1:]) != shape:
            raise UserError(f"codes of shape {list(codes.shape)}: the tokenizer makes [B, {', '.join(map(str, shape))}]")

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, L] int64, or the means of the latents, standardised, [B, D, L]."""
        if self.spec.discrete:
            return self.quantize.nearest(self.encode_continuous(images))
        return self.normalize(self.moments(images)[0])

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the latents, both standardised, each [B, D, L].

        Raises:
            UserError: the tokens are codes.
        """
        if self.spec.discrete:
            raise UserError("quantize_mode is 'vq': codes of a codebook have no posterior; take a tokenizer with quantize_mode 'vae'")
        return self.standardized(*self.moments(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, L] or latents [B, D, L] -> images [B, 3, H, W], about [-1, 1] but not clamped."""
        self.check_codes(codes)
        return self.decode_vectors(self.quantize.look_up(codes) if self.spec.discrete else self.denormalize(codes).transpose(1, 2))

    def encode_continuous(self, images: Tensor) -> Tensor:
        """Encoder outputs: [B, L, D] before quantisation, or [B, L, 2 D], mean and logarithm of the variance of the latents."""
        self.check_images(images)
        if images.dim() != 4:
            raise UserError(f"images of shape {list(images.shape)}: [B, 3, H, W] is expected")
        return self.encoder((images + 1) / 2)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, each [B, D, L], not standardised ("vae" only)."""
        mean, logvar = self.encode_continuous(images).transpose(1, 2).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors or latents that are not standardised, [B, L, D] -> images [B, 3, H, W]."""
        return self.head(self.decoder(vectors.to(self.decoder.embed.weight.dtype))) * 2 - 1

    def proxy_logits(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the first stage of training compares with the pixel tokenizer's codes by cross-entropy (section 3.2; `is_legacy` only).

        Returns:
            Logits [B, pixel_codebook_size, h, w], and the quantiser's losses.
        """
        if not isinstance(self.head, CodebookHead):
            raise UserError("proxy codes are for TiTok's first release; set is_legacy to true, or train on images alone")
        quantized = self.quantize(self.encode_continuous(images))
        logits = self.head.logits(self.decoder(quantized.quantized.to(self.decoder.embed.weight.dtype)))
        return _as_grid(logits), quantized.losses

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct [B, 3, H, W]; latents are drawn in training and are the means in eval mode.

        `losses` are the quantiser's, or `kl`.
        """
        if self.spec.discrete:
            z = self.encode_continuous(images)
            quantized = self.quantize(z)
            return TokenizerOutput(self.decode_vectors(quantized.quantized), quantized.codes, z, quantized.losses)
        mean, logvar = (statistic.float() for statistic in self.moments(images))
        latents = mean + torch.randn_like(mean) * (logvar / 2).exp() if self.training else mean
        kl = kl_per_token(mean, logvar).sum(1).mean()
        return TokenizerOutput(self.decode_vectors(latents.transpose(1, 2)), None, None, {"kl": self.config["kl_weight"] * kl})


def kl_per_token(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from a standard normal distribution, summed over channels: two [B, D, L] -> [B, L], in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)


class LatentTransformer(Trunk, nn.Module):
    """Blocks over [class token, N patches, L latent tokens], each with a learned position."""

    def __init__(self, num_patches: int, num_latents: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(dim**-0.5 * torch.randn(1, dim))
        self.position_embed = nn.Parameter(dim**-0.5 * torch.randn(1 + num_patches, dim))
        self.latent_position_embed = nn.Parameter(dim**-0.5 * torch.randn(num_latents, dim))
        self.norm_in = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(dim)

    def run(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [B, N, C] and latent tokens [B, L, C] after all blocks, before `norm_out`."""
        grid = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], 1) + self.position_embed
        x = self.norm_in(torch.cat([grid, latents + self.latent_position_embed], 1))  # [B, 1 + N + L, C]
        x = self.run_blocks(lambda i, x: self.blocks[i](x), len(self.blocks), x)
        return x[:, 1 : grid.shape[1]], x[:, grid.shape[1] :]


class TiTokEncoder(LatentTransformer):
    """Images [B, 3, H, W] in [0, 1] -> the latent tokens, [B, L, out_dim]."""

    def __init__(
        self, patch_size: int, num_patches: int, num_latents: int, dim: int, depth: int, num_heads: int, *, out_dim: int, is_legacy: bool
    ) -> None:
        super().__init__(num_patches, num_latents, dim, depth, num_heads)
        self.is_legacy = is_legacy
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.latent_tokens = nn.Parameter(dim**-0.5 * torch.randn(num_latents, dim))
        self.proj = nn.Linear(dim, out_dim)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, N, C]
        latents = self.norm_out(self.run(patches, self.latent_tokens.expand(len(images), -1, -1))[1])  # [B, L, C]
        if self.is_legacy:
            # the first release reads [L, C] as [C, L] without transposing; its weights need that
            latents = latents.reshape(len(latents), latents.shape[2], latents.shape[1]).transpose(1, 2)
        return self.proj(latents)


class TiTokDecoder(LatentTransformer):
    """Latent tokens [B, L, D] -> features of the patches [B, N, C], which enter as one mask token."""

    def __init__(self, token_dim: int, num_patches: int, num_latents: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__(num_patches, num_latents, dim, depth, num_heads)
        self.num_patches = num_patches
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        self.embed = nn.Linear(token_dim, dim)
        self.apply(initialize)

    def forward(self, vectors: Tensor) -> Tensor:
        patches, _ = self.run(self.mask_token.expand(len(vectors), self.num_patches, -1), self.embed(vectors))
        return self.norm_out(patches)


class PatchHead(nn.Module):
    """Features [B, N, C] -> images in [0, 1]: a patch of pixels from each, and a convolution over the seams."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.apply(initialize)

    @property
    def last_layer(self) -> Tensor:
        return self.conv_out.weight

    def forward(self, features: Tensor) -> Tensor:
        p = self.patch_size
        return self.conv_out(rearrange(_as_grid(self.proj(features)), "b (p1 p2 c) h w -> b c (h p1) (w p2)", p1=p, p2=p, c=3))


class CodebookHead(nn.Module):
    """Features [B, N, C] -> probabilities of a pixel tokenizer's codes -> their mean code vectors -> images in [0, 1]."""

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int, pixel_decoder: Decoder) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, codebook_size))
        self.apply(initialize)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.pixel_decoder = pixel_decoder

    @property
    def last_layer(self) -> Tensor:
        return self.pixel_decoder.conv_out.weight

    def logits(self, features: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, codebook_size]."""
        return self.mlp(features)

    def forward(self, features: Tensor) -> Tensor:
        vectors = self.logits(features).softmax(-1) @ self.codebook.weight
        return self.pixel_decoder(_as_grid(vectors))


def _as_grid(tokens: Tensor) -> Tensor:
    """Tokens of a square grid [B, N, C] -> [B, C, h, w]."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=round(tokens.shape[1] ** 0.5))


class Block(nn.Module):
    """Attention and a GELU perceptron of four times the width, each behind a LayerNorm (arXiv:2010.11929)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Multi-head attention with biases; one fused projection ordered [queries | keys | values]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each [B, N, H, C / H]
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, N, C / H]
        return self.proj(out.transpose(1, 2).flatten(2))


def initialize(module: nn.Module) -> None:
    """The released models' start: normal with deviation 0.02, cut at 2; attention's fused projection Xavier-uniform; biases 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    if isinstance(module, SelfAttention):  # after its children
        nn.init.xavier_uniform_(module.qkv.weight)
