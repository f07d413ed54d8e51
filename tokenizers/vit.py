"""ViTok: a vision transformer encodes patches, a second one decodes them (arXiv:2501.09755, section 2; philippe-eecs/vitok's class AE).

Shapes: images [B, 3, H, W] or clips [B, 3, T, H, W] in [-1, 1]; patches of q frames and p x p pixels lie on a grid t x h x w and are
P = t*h*w tokens in that order; N tokens carry the code, c channels each, so that E = N*c numbers stand for an image. D is a width.
Parameter names follow the released class.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.layers.embed import grid_positions, resize_position_table, sincos_table
from genvision.layers.patches import Grid, TubeletDecode, TubeletEmbed
from genvision.layers.rotary import mixed_rotary_frequencies, mixed_rotary_table, rotary_table
from genvision.layers.transformer import Transformer
from genvision.tokenizers.base import ContinuousTokenizer, TokenizerOutput, TokenizerSpec, check_statistics

ROPE_AXES = {"none": 0, "1d_axial": 1, "2d_axial": 2, "2d_mixed": 2}
TABLE_AXES = {"nope": 0, "sincos1d": 1, "sincos2d": 2, "sincos3d": 3, "learned": 3, "dec": 3}
"""Axes of the sin-cos table that a position embedding is or starts from."""


class ViTok(ContinuousTokenizer, ModelMixin, ConfigMixin):
    """Images or clips to continuous codes and back.

    Other sizes than the trained work where p divides them: rotary positions go on counting (the sequence in raster order, or rows and
    columns); position tables are resized over h x w by bicubic interpolation, but `sincos1d` is continued. Frames are not resized.

    Args:
        image_size: side of the training images.
        num_frames: T of the training clips; 1 takes images.
        patch_size: p.
        tubelet_size: q.
        encoder_width: D of the encoder; MLPs are int(2.67 D) wide.
        encoder_depth: blocks of the encoder.
        encoder_heads: heads of the encoder.
        decoder_width: D of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: heads of the decoder.
        code_length: N code tokens that are no grid and stand before the patches; None codes every patch by one token, N = P.
        code_width: c.
        variational: the code is a sample of a normal distribution in training, its mean otherwise.
        rope_style: rotary positions; `1d_axial` of the whole sequence, `2d_axial` of column and row, `2d_mixed` with learned frequencies
            (the two last for images with one token a patch only).
        rope_theta: base of the rotary frequencies.
        position_embedding: table added to the patches in front of encoder and decoder; `nope` is none, `learned` starts from `sincos3d`,
            `dec` is the same in the decoder only.
        code_lengths: lengths from which training draws one for each image, to replace what lies behind in the code by a mask token;
            needs `code_length`. None always uses the whole code.
        kl_weight: weight of the KL divergence, which is a MEAN over tokens, channels and images.
        latent_mean: taken off by `encode`; one number or one a channel.
        latent_std: `encode` divides by it; one number or one a channel.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerBlock",)
    _replicated_modules = ("tubelet_decode",)
    posemb: nn.Parameter | None
    dec_posemb: nn.Parameter | None
    code: nn.Parameter | None
    mask_token: nn.Parameter | None
    enc_freqs: nn.Parameter | None
    dec_freqs: nn.Parameter | None

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        num_frames: int = 1,
        patch_size: int = 16,
        tubelet_size: int = 1,
        encoder_width: int = 768,
        encoder_depth: int = 6,
        encoder_heads: int = 12,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        code_length: int | None = None,
        code_width: int = 16,
        variational: bool = True,
        rope_style: Literal["none", "1d_axial", "2d_axial", "2d_mixed"] = "1d_axial",
        rope_theta: float = 10000.0,
        position_embedding: Literal["nope", "sincos1d", "sincos2d", "sincos3d", "learned", "dec"] = "nope",
        code_lengths: tuple[int, ...] | None = None,
        kl_weight: float = 1e-3,
        latent_mean: float | tuple[float, ...] = 0.0,
        latent_std: float | tuple[float, ...] = 1.0,
    ) -> None:
        super().__init__()
        self._check_options(dict(self.config))
        self.patch = (tubelet_size, patch_size, patch_size)
        self.grid: Grid = (num_frames // tubelet_size, image_size // patch_size, image_size // patch_size)
        self.is_video, self.is_variational, self.beta = num_frames > 1, variational, kl_weight
        self.rope, self.theta, self.lengths = rope_style, rope_theta, tuple(code_lengths or ())
        num_patches = math.prod(self.grid)
        places = code_length or (num_patches if self.is_video else None)
        self._spec = TokenizerSpec(image_size=image_size, downsample=patch_size, channels=code_width, num_tokens=places)
        self.check_image_size(image_size)

        self.tubelet_embed = TubeletEmbed(encoder_width, self.patch)
        self.encoder = Transformer(encoder_width, encoder_depth, encoder_heads, int(2.67 * encoder_width))
        self.encoder_to_code = nn.Linear(encoder_width, code_width * (2 if variational else 1))
        self.code_to_decoder = nn.Linear(code_width, decoder_width)
        self.decoder = Transformer(decoder_width, decoder_depth, decoder_heads, int(2.67 * decoder_width))
        self.tubelet_decode = TubeletDecode(decoder_width, self.patch)

        for name in ("posemb", "dec_posemb", "code", "mask_token", "enc_freqs", "dec_freqs"):
            self.register_parameter(name, None)
        self.table_axes = TABLE_AXES[position_embedding]
        trained = position_embedding in ("learned", "dec")
        if self.table_axes:
            if position_embedding != "dec":
                self.posemb = nn.Parameter(self._table(self.grid, encoder_width), requires_grad=trained)
            self.dec_posemb = nn.Parameter(self._table(self.grid, decoder_width), requires_grad=trained)
        if code_length is not None:
            places_1d = torch.arange(code_length).unsqueeze(1)
            self.code = nn.Parameter(sincos_table(places_1d, encoder_width).unsqueeze(0), requires_grad=False)
        if self.lengths:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, code_width))
        if rope_style == "2d_mixed":
            sides = ((encoder_depth, encoder_heads, encoder_width), (decoder_depth, decoder_heads, decoder_width))
            start = [mixed_rotary_frequencies(depth, heads, width // heads, base=rope_theta) for depth, heads, width in sides]
            self.enc_freqs, self.dec_freqs = nn.Parameter(start[0]), nn.Parameter(start[1])
        self.apply(_init)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def last_layer(self) -> Tensor:
        return self.tubelet_decode.proj.weight

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] or clips [B, 3, T, H, W] in [-1, 1] -> the posterior's mean, standardised.

        Returns:
            [B, c, h, w] where every patch of an image has its token, else [B, c, N].
        """
        mean, _ = self.moments(images)
        return self.normalize(mean)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, both standardised and shaped as `encode`'s result; zeros if not variational."""
        if not self.is_variational:
            return super().posterior(images)
        mean, logvar = self.moments(images)
        assert logvar is not None
        return self.standardized(mean, logvar)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Standardised codes as `encode` gives them -> images or clips, about [-1, 1] but not clamped.

        Args:
            codes: a code [B, c, N] may be cut short where `code_lengths` were trained.
            size: (H, W) or (T, H, W) to make of codes [B, c, N]; None makes the size that was trained.

        Raises:
            UserError: codes are no such codes, or do not fit the size.
        """
        grid = self._grid_of(codes, size)
        tokens = self.denormalize(codes).flatten(2).transpose(1, 2)  # [B, N, c]
        if self.mask_token is not None:
            missing = (self.spec.num_tokens or 0) - tokens.shape[1]
            tokens = torch.cat([tokens, self.mask_token.expand(tokens.shape[0], missing, -1).type_as(tokens)], dim=1)
        return self._decode(tokens, grid)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (in [-30, 20]) of the posterior, shaped as `encode`'s result and not standardised.

        The log-variance is None where the code is not variational.
        """
        mean, logvar, grid = self._posterior(images)
        return self._places(mean, grid), None if logvar is None else self._places(logvar, grid)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images or clips from a sample of the posterior, in eval mode from its mean; the loss is `kl`."""
        z, logvar, grid = self._posterior(images)
        losses = {}
        if logvar is not None:
            mean, logvar = z.float(), logvar.float()
            losses["kl"] = self.beta * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            if self.training:
                z = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).type_as(z)
        if self.training and self.mask_token is not None:
            lengths = torch.tensor(self.lengths, device=z.device)
            kept = lengths[torch.randint(len(self.lengths), (z.shape[0], 1), device=z.device)]  # [B, 1]
            hidden = torch.arange(z.shape[1], device=z.device) >= kept  # [B, N]
            z = torch.where(hidden.unsqueeze(-1), self.mask_token.type_as(z), z)
        return TokenizerOutput(self._decode(z, grid), codes=None, z=None, losses=losses)

    def freeze_encoder(self) -> None:
        """Leave only decoder blocks, `code_to_decoder` and `tubelet_decode` to training: stage 2 of the paper, with a discriminator."""
        self.requires_grad_(False)
        for part in (self.decoder, self.code_to_decoder, self.tubelet_decode):
            part.requires_grad_(True)

    def check_images(self, images: Tensor) -> None:
        """Raises UserError where images or clips are not shaped as `encode` takes them."""
        wanted = "[B, 3, T, H, W]" if self.is_video else "[B, 3, H, W]"
        if images.dim() != 4 + self.is_video:
            raise UserError(f"images of shape {list(images.shape)}: {wanted} is expected, as num_frames is {self.grid[0] * self.patch[0]}")
        super().check_images(images)
        if self.is_video and (images.shape[2] < self.patch[0] or images.shape[2] % self.patch[0]):
            raise UserError(f"clips of {images.shape[2]} frames do not fit tubelets of {self.patch[0]}; choose a multiple of that")

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        """Mean and log-variance [B, N, c] and the grid of the patches."""
        self.check_images(images)
        clips = images.to(self.last_layer.dtype)
        clips = clips if self.is_video else clips.unsqueeze(2)
        t, h, w = (side // step for side, step in zip(clips.shape[2:], self.patch, strict=True))
        x = self.tubelet_embed(clips)  # [B, P, D]
        if self.posemb is not None:
            x = x + self._resized(self.posemb, (t, h, w))
        if self.code is not None:
            x = torch.cat([self.code.expand(x.shape[0], -1, -1).type_as(x), x], dim=1)
        x = self.encoder(x, self._rotary(x.shape[1], (t, h, w), self.encoder, self.enc_freqs))
        if self.code is not None:
            x = x[:, : self.code.shape[1]]
        code = self.encoder_to_code(x)
        if not self.is_variational:
            return code, None, (t, h, w)
        mean, logvar = code.chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20), (t, h, w)

    def _decode(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Code tokens [B, N, c], not standardised -> images or clips."""
        x = self.code_to_decoder(tokens.to(self.last_layer.dtype))
        if self.dec_posemb is not None:
            table = self._resized(self.dec_posemb, grid)
            x = x + table if self.code is None else torch.cat([x, table.expand(x.shape[0], -1, -1).type_as(x)], dim=1)
        x = self.decoder(x, self._rotary(x.shape[1], grid, self.decoder, self.dec_freqs))
        clips = self.tubelet_decode(x[:, -math.prod(grid) :], grid)
        return clips if self.is_video else clips.squeeze(2)

    def _places(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, c] -> [B, c, h, w] or [B, c, N]."""
        channels_first = tokens.transpose(1, 2)
        return channels_first if self.spec.num_tokens is not None else channels_first.unflatten(2, grid[1:])

    def _rotary(self, length: int, grid: Grid, network: Transformer, frequencies: Tensor | None) -> Tensor | None:
        """The table for all blocks.

        Computed in every pass, so that it is float32 and on the right device whatever was done to the weights: 0.1 ms at 64 tokens.
        """
        if self.rope == "none":
            return None
        device = self.last_layer.device
        if self.rope == "1d_axial":
            return rotary_table(torch.arange(length, device=device).float().unsqueeze(1), network.head_dim, base=self.theta)
        positions = grid_positions(grid, 2, device).float()
        if frequencies is None:
            return rotary_table(positions, network.head_dim, base=self.theta)
        return mixed_rotary_table(positions, frequencies.unflatten(2, (network.num_heads, network.head_dim // 2)))

    def _table(self, grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
        """[1, P, D], computed."""
        return sincos_table(grid_positions(grid, self.table_axes, device), width).unsqueeze(0)

    def _resized(self, table: Tensor, grid: Grid) -> Tensor:
        """A position table [1, P, D] of the trained grid for another one, see the class."""
        if grid == self.grid:
            return table
        if self.table_axes == 1:
            return self._table(grid, table.shape[2], table.device).to(table.dtype)
        if grid[0] != self.grid[0]:
            raise UserError(
                f"clips of {grid[0] * self.patch[0]} frames: the tokenizer's position table is for {self.grid[0] * self.patch[0]}; "
                "cut clips of that length"
            )
        return resize_position_table(table, self.grid, grid)

    def _grid_of(self, codes: Tensor, size: Sequence[int] | None) -> Grid:
        """The grid of patches to decode codes to; raises UserError where they do not fit."""
        self.check_codes(codes)
        tokens = self.spec.num_tokens
        if codes.dim() != (4 if tokens is None else 3):
            wanted = f"[B, {self.spec.channels}, {'h, w' if tokens is None else 'N'}]"
            raise UserError(f"latents of shape {list(codes.shape)}: the tokenizer's have the shape {wanted}")
        grid = self.grid if tokens is not None else (1, codes.shape[2], codes.shape[3])
        if size is not None:
            pixels = tuple(size) if self.is_video else (1, *size)
            if len(pixels) != 3 or any(side < step or side % step for side, step in zip(pixels, self.patch, strict=True)):
                raise UserError(f"size {list(size)} is no {'T, H, W' if self.is_video else 'H, W'} in multiples of patches {self.patch}")
            given = (pixels[0] // self.patch[0], pixels[1] // self.patch[1], pixels[2] // self.patch[2])
            if tokens is None and given != grid:
                raise UserError(f"size {list(size)}: the latents are {grid[1]} x {grid[2]} patches of {self.patch[1]}; leave the size out")
            grid = given
        length = codes.shape[-1]
        if self.code is not None:
            if not (1 <= length <= self.code.shape[1] if self.lengths else length == self.code.shape[1]):
                hint = "at most" if self.lengths else "exactly"
                raise UserError(f"latents of {length} tokens: the tokenizer's codes have {hint} {self.code.shape[1]}")
        elif tokens is not None and length != math.prod(grid):
            raise UserError(
                f"latents of {length} tokens do not fill a grid of {' x '.join(map(str, grid))}; give the size that was encoded"
            )
        return grid

    @staticmethod
    def _check_options(config: dict[str, Any]) -> None:
        """Raises UserError where options are out of range or do not go together."""
        names = ("patch_size", "tubelet_size", "num_frames", "code_width", "code_length", *(f"{s}_{k}" for s in SIDES for k in SIZE_KEYS))
        for name in names:
            if config[name] is not None and config[name] < 1:
                raise UserError(f"{name} must be at least 1, got {config[name]}")
        for name, known in (("rope_style", ROPE_AXES), ("position_embedding", TABLE_AXES)):
            if config[name] not in known:
                raise UserError(f"{name} '{config[name]}' is unknown; known are {', '.join(known)}")
        rope, table, code_length = config["rope_style"], config["position_embedding"], config["code_length"]
        if config["num_frames"] % config["tubelet_size"]:
            raise UserError(f"num_frames {config['num_frames']} must be a multiple of tubelet_size, {config['tubelet_size']}")
        if ROPE_AXES[rope] == 2 and (config["num_frames"] > 1 or code_length is not None):
            raise UserError(f"rope_style '{rope}' is for images with one token a patch; clips and codes of a set length take '1d_axial'")
        if TABLE_AXES[table] == 2 and config["num_frames"] > config["tubelet_size"]:
            raise UserError(f"position_embedding '{table}' does not tell frames apart; clips take sincos3d")
        if code_length is not None and table == "nope":
            raise UserError("code_length needs a position_embedding, as the decoder's patches start from nothing else; take sincos2d")
        lengths = config["code_lengths"]
        if lengths is not None and (code_length is None or not lengths or not all(1 <= n <= code_length for n in lengths)):
            raise UserError(f"code_lengths {list(lengths)} must lie in 1 .. code_length, which is {code_length}")
        if config["kl_weight"] < 0:
            raise UserError(f"kl_weight must not be negative, got {config['kl_weight']}")
        check_statistics(config["code_width"], latent_mean=config["latent_mean"], latent_std=config["latent_std"])
        for side in SIDES:
            width, heads = config[f"{side}_width"], config[f"{side}_heads"]
            if width % heads or (width // heads) % max(2 * ROPE_AXES[rope], 1):
                raise UserError(
                    f"{side}_width {width} over {side}_heads {heads}: rope_style '{rope}' needs a multiple of "
                    f"{max(2 * ROPE_AXES[rope], 1)} channels in every head"
                )
            axes = TABLE_AXES[table] if side == "decoder" or table != "dec" else 0
            for reason, step in ((f"position_embedding '{table}'", 2 * axes), ("code_length", 2 if code_length else 0)):
                if step and (width % step or width < 2 * step):
                    raise UserError(f"{side}_width {width}: {reason} needs a multiple of {step}, at least {2 * step}")


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SIDES, SIZE_KEYS = ("encoder", "decoder"), ("width", "depth", "heads")


class ViTokSize(NamedTuple):
    """One side of a published model."""

    width: int
    depth: int
    heads: int


VITOK_SIZES = {"S": ViTokSize(768, 6, 12), "B": ViTokSize(768, 12, 12), "L": ViTokSize(1152, 24, 16), "H": ViTokSize(1312, 32, 16)}
"""Table 1 of the paper; H is in the released code only (and has 1296 in some of its files, which rotary positions cannot divide)."""


def vitok_options(
    name: str, *, image_size: int = 256, num_frames: int | None = None, code_width: int = 16, shared_width: bool = False
) -> dict[str, Any]:
    """Arguments of `ViTok` for a name of the paper, ENCODER-DECODER/TUBELETxPATCH: "S-B/1x16" (or "S-B/16"), "S-L/1x16", "S-B/4x8".

    Args:
        image_size: side in pixels; the paper has 256 and 512, and 128 for clips.
        num_frames: of clips; None is 16 where the tubelet is longer than one frame, else 1.
        code_width: c.
        shared_width: the encoder takes width and heads of the decoder. The released class knows nothing else; the paper counts the
            parameters of separate widths (S-L: 427 million against 480).

    Raises:
        UserError: the name is none of these.
    """
    match = re.fullmatch(r"([A-Z])-([A-Z])/(?:(\d+)x)?(\d+)", name)
    if not match or not {match[1], match[2]} <= set(VITOK_SIZES):
        raise UserError(f"ViTok '{name}' is unknown; expected is S-B/1x16, for example, with sizes from {', '.join(VITOK_SIZES)}")
    tubelet_size, patch_size = int(match[3] or 1), int(match[4])
    num_frames = (16 if tubelet_size > 1 else 1) if num_frames is None else num_frames
    encoder, decoder = VITOK_SIZES[match[1]], VITOK_SIZES[match[2]]
    if shared_width:
        encoder = decoder._replace(depth=encoder.depth)
    sides = {f"{side}_{key}": value for side, size in zip(SIDES, (encoder, decoder), strict=True) for key, value in size._asdict().items()}
    return dict(
        image_size=image_size,
        num_frames=num_frames,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        code_width=code_width,
        position_embedding="sincos3d" if num_frames > 1 else "nope",
        **sides,
    )
