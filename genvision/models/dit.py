"""Diffusion transformer: DiT (arXiv:2212.09748), SiT (arXiv:2401.08740), LightningDiT (arXiv:2501.01423), one network with switches.

Shapes: B images, latents [B, c, h, w] (or [B, c, L]), N tokens of width C, R rows of conditions, M modulation values a row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from genvision.errors import UserError, check_sizes
from genvision.layers.checkpointing import Trunk
from genvision.layers.embed import LabelEmbedding, TimeEmbedding, grid_positions, sincos_table
from genvision.layers.mlp import MLP, PackedSwiGLU
from genvision.layers.modulation import add_gated, gated_then_modulated, modulated
from genvision.layers.norm import RMSNorm
from genvision.layers.patches import PatchEmbed
from genvision.layers.rotary import rotary_table
from genvision.layers.transformer import SelfAttention
from genvision.models.base import Generator, check_class_dropout

CHOICES = {
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "swiglu"),
    "path": ("ddpm", "linear", "gvp", "vp"),
    "prediction": ("noise", "clean", "velocity", "score"),
    "time_input": ("step", "toward_noise", "toward_data"),
}

RunBlocks = Callable[[Callable[[int, Tensor], Tensor], int, Tensor], Tensor]
"""(block number and tokens before it -> tokens behind it), number of blocks, tokens before the first -> tokens behind the last."""


class DiT(Trunk, Generator, ModelMixin, ConfigMixin):
    """Predicts noise, data or velocity of noisy latents, told time and class; the defaults are DiT-S/2 without learned variance.

    Sizes are depth, hidden_dim, num_heads: S 12, 384, 6; B 12, 768, 12; L 24, 1024, 16; XL 28, 1152, 16.

    Args:
        input_size: h and w of the latents.
        in_channels: c.
        patch_size: latent places of a token's side.
        hidden_dim: C.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward block over C (SwiGLU takes two thirds of it).
        num_classes: classes; the null label is this number.
        class_dropout: probability of dropping the label in training; 0 leaves out the null class.
        learn_sigma: the head has 2c channels; the second half is the variance of `ddpm`, and left out of the output on other paths (SiT).
        norm: `layer` (without weights) or `rms` (with them).
        mlp: `gelu` or `swiglu`.
        use_rope: turn queries and keys by row and column, besides the position table.
        use_qk_norm: normalise queries and keys.
        use_shift: modulation shifts before attention and feed-forward, besides scaling and gating.
        scale_conditioned: a guidance scale is told like the time (Model-guidance, arXiv:2502.12154).
        norm2_eps: of the norm before the feed-forward block, 1e-5 in diffusers; that of all others is 1e-6.
        time_freq_shift: time frequencies are 10000^(-k / (128 - shift)): 0 in the original code, 1 in diffusers.
        time_scale: times are multiplied by it; SiT, REPA and LightningDiT feed [0, 1] as it is.
        path: what noise does to data: `ddpm` is DiT's 1,000 steps, the others are the flows of genvision.objectives.paths.
        prediction: `noise`, `clean`, `velocity` or `score`.
        time_input: what the network is told: `step` (ddpm), or a time that is 1 at the noise (`toward_noise`) or at the data
            (`toward_data`: SiT, LightningDiT; a velocity then points to the data, too). Unless told, step for ddpm and toward_noise else.
        align_depth: hidden states behind this many blocks go through `projectors` in training (REPA, arXiv:2410.06940); 0 is off.
        align_dims: channels of each frozen network's features.
        align_hidden: width of the projectors.
        sequence_length: L of latents [B, c, L] that are no grid; input_size and patch_size have no meaning then.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        learn_sigma: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        use_rope: bool = False,
        use_qk_norm: bool = False,
        use_shift: bool = True,
        scale_conditioned: bool = False,
        norm2_eps: float = 1e-6,
        time_freq_shift: int = 0,
        time_scale: float = 1.0,
        path: str = "ddpm",
        prediction: str = "noise",
        time_input: str | None = None,
        align_depth: int = 0,
        align_dims: tuple[int, ...] = (),
        align_hidden: int = 2048,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, in_channels=in_channels, patch_size=patch_size, sequence_length=sequence_length)
        check_sizes(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads, num_classes=num_classes, align_hidden=align_hidden)
        check_class_dropout(class_dropout)
        if time_input is None:
            time_input = "step" if path == "ddpm" else "toward_noise"
            self.register_to_config(time_input=time_input)
        given = {"norm": norm, "mlp": mlp, "path": path, "prediction": prediction, "time_input": time_input}
        for name, choice in given.items():
            if choice not in CHOICES[name]:
                raise UserError(f"{name} '{choice}' is unknown; choose one of {', '.join(CHOICES[name])}")
        if (path == "ddpm") != (time_input == "step"):
            raise UserError(f"time_input {time_input} does not go with path {path}; ddpm has steps, the other paths have not")
        if path == "ddpm" and prediction == "score":
            raise UserError("prediction score is for flows; with path ddpm choose noise, clean or velocity")
        if hidden_dim % num_heads or hidden_dim % 4 or (use_rope and (hidden_dim // num_heads) % 4):
            raise UserError(
                f"hidden_dim {hidden_dim} must be a multiple of 4, and num_heads {num_heads} times a multiple of 4 for use_rope"
            )
        if sequence_length is None and input_size % patch_size:
            raise UserError(f"input_size {input_size} must be a multiple of patch_size {patch_size}")
        if not 0 <= align_depth <= depth or bool(align_depth) != bool(align_dims):
            raise UserError(f"align_depth {align_depth} must lie in 1 .. depth {depth} with align_dims, and be 0 without them")
        self.num_classes, self.has_null_label = num_classes, class_dropout > 0
        self.patch = 1 if sequence_length is not None else patch_size
        self.code_shape = (in_channels, input_size, input_size) if sequence_length is None else (in_channels, sequence_length)
        self.grid = (1, sequence_length) if sequence_length is not None else (input_size // patch_size,) * 2
        self.out_channels = in_channels * (2 if learn_sigma and path == "ddpm" else 1)

        self.patch_embed = PatchEmbed(in_channels, hidden_dim, self.patch)
        self.time_embed = TimeEmbedding(hidden_dim, time_freq_shift, time_scale)
        self.scale_embed = TimeEmbedding(hidden_dim, time_freq_shift) if scale_conditioned else None
        self.label_embed = LabelEmbedding(num_classes, hidden_dim, class_dropout)
        self.blocks = nn.ModuleList(
            Block(
                hidden_dim,
                num_heads,
                MLP(hidden_dim, int(hidden_dim * mlp_ratio))
                if mlp == "gelu"
                else PackedSwiGLU(hidden_dim, int(2 / 3 * int(hidden_dim * mlp_ratio))),
                norm,
                qk_norm=use_qk_norm,
                use_shift=use_shift,
                norm2_eps=norm2_eps,
            )
            for _ in range(depth)
        )
        self.head = Head(hidden_dim, self.patch, in_channels * (2 if learn_sigma else 1), norm)
        self.projectors = nn.ModuleList(Projector(hidden_dim, align_hidden, channels) for channels in align_dims)
        # not buffers: they stay float32 whatever the weights are cast to, and are no part of a checkpoint
        axes = 1 if sequence_length is not None else 2
        positions = grid_positions((1, *self.grid), axes)  # columns x (and y)
        self.positions = sincos_table(positions, hidden_dim, reaches_base=False)  # [N, C]
        self.rotary = rotary_table(positions.flip(1).float(), hidden_dim // num_heads) if use_rope else None  # rows come first here
        self._initialize()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        scale: Tensor | None = None,
        modulation: Tensor | None = None,
        run_blocks: RunBlocks | None = None,
        with_features: bool = False,
    ) -> Any:
        """The prediction for noisy latents.

        Args:
            x: [B, *code_shape].
            t: [B], what the network is told of the time, see `time_input`; fractions are fine.
            labels: int64 [B]; `null_label` for none.
            drop: boolean [B], whose label is replaced by the null one; None draws it in training.
            scale: [B], the guidance scale, only of scale-conditioned models.
            modulation: [B, M] from `modulation_rows`, which stands for t, labels, drop and scale.
            run_blocks: what to do in place of running all blocks, for samplers (genvision.samplers.block_cache); not with features.
            with_features: give the projected hidden states behind block `align_depth`, too (REPA).

        Returns:
            [B, out_channels, ...]; with a learned variance its coefficients are the second half of the channels. With features, also a
            list of [B, N, Z], one for each projector.
        """
        tokens, hidden = self._run(x, t, labels, drop, scale, modulation, run_blocks)
        output = self.unpatchify(tokens)
        return (output, [projector(hidden) for projector in self.projectors]) if with_features else output

    def modulation_rows(self, t: Tensor, labels: Tensor, drop: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """All that depends on time and class, for a sampler that meets the same times and classes many times: [R, M]."""
        condition = F.silu(self.condition(t, labels, drop, scale))
        return torch.cat([block.modulation(condition) for block in self.each_block()] + [self.head.modulation(condition)], dim=1)

    def condition(self, t: Tensor, labels: Tensor, drop: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Time, class and scale as one vector each, [R, C]."""
        if (scale is None) != (self.scale_embed is None):
            told = "got none" if scale is None else "was given one"
            raise UserError(f"a guidance scale is told to scale-conditioned models and to no others; this model {told}")
        condition = self.time_embed(t) + self.label_embed(labels, drop).squeeze(1)
        return condition if scale is None or self.scale_embed is None else condition + self.scale_embed(scale)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Head outputs [B, N, patch * patch * channels] -> [B, out_channels, ...]."""
        h, w = self.grid
        x = rearrange(tokens, "b (h w) (p r c) -> b c (h p) (w r)", h=h, w=w, p=self.patch, r=self.patch)
        x = x[:, : self.out_channels]
        return x.squeeze(2) if len(self.code_shape) == 2 else x

    def image_size(self, downsample: int, trained_size: int) -> int:
        """See `Generator.image_size`."""
        return self.code_shape[-1] * downsample if len(self.code_shape) == 3 else trained_size

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """See `Generator.hidden_states`: clean latents at the time of clean data, with the null label; [B, N, C] a layer."""
        if not self.has_null_label:
            raise UserError("the model was trained without a null condition (class_dropout 0), so it cannot read images without labels")
        labels = torch.full((codes.shape[0],), self.null_label, device=codes.device)
        t = torch.full((codes.shape[0],), float(self.config.time_input == "toward_data"), device=codes.device)
        scale = torch.zeros_like(t) if self.scale_embed is not None else None
        condition = F.silu(self.condition(t, labels, None, scale))
        x = self._tokens(codes)
        states = {0: x}
        for layer, block in enumerate(self.each_block()[: max(layers)], start=1):
            x = block.conditioned(x, condition, self.rotary)
            if layer in layers:
                states[layer] = x
        return [states[layer] for layer in layers]

    def each_block(self) -> "list[Block]":
        """The blocks in their order, for the type checker."""
        return [cast(Block, block) for block in self.blocks]

    def _tokens(self, x: Tensor) -> Tensor:
        x = x.to(self.patch_embed.proj.weight.dtype)
        return self.patch_embed(x if x.dim() == 4 else x.unsqueeze(2)) + self.positions.to(x.dtype)

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        drop: Tensor | None,
        scale: Tensor | None,
        modulation: Tensor | None,
        run_blocks: RunBlocks | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Head outputs [B, N, ...], and hidden states where projectors need them."""
        hidden, blocks, depth = self._tokens(x), self.each_block(), self.config.align_depth
        widths = [block.modulation.out_features for block in blocks] + [2 * hidden.shape[-1]]
        parts = modulation.split(widths, dim=1) if modulation is not None else None
        condition = F.silu(self.condition(t, labels, drop, scale)) if modulation is None else hidden.new_empty(0)

        def call(i: int, x: Tensor) -> Tensor:
            return blocks[i].conditioned(x, condition, self.rotary) if parts is None else blocks[i](x, parts[i], self.rotary)

        aligned = None
        if run_blocks is not None:
            hidden = run_blocks(call, len(blocks), hidden)
        else:
            hidden = aligned = self.run_blocks(call, depth, hidden)
            hidden = self.run_blocks(lambda i, x: call(depth + i, x), len(blocks) - depth, hidden)
        return self.head(hidden, self.head.modulation(condition) if parts is None else parts[-1]), aligned if depth else None

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.label_embed.table.weight, std=0.02)
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        if self.scale_embed is not None:
            nn.init.normal_(self.scale_embed.fc1.weight, std=0.02)
            nn.init.normal_(self.scale_embed.fc2.weight, std=0.0002)  # small, so that a run can go on from a plain model
        # every block starts as the identity, and the output as zero
        for layer in [*(block.modulation for block in self.each_block()), self.head.modulation, self.head.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        device = self.head.linear.weight.device
        self.positions = self.positions.to(device)
        self.rotary = self.rotary.to(device) if self.rotary is not None else None
        return self


def make_norm(kind: str, dim: int, eps: float = 1e-6) -> nn.Module:
    """LayerNorm without weights, or RMSNorm with them."""
    return RMSNorm(dim, eps) if kind == "rms" else nn.LayerNorm(dim, eps, elementwise_affine=False)


class Block(nn.Module):
    """x + gate * attention(modulated norm x), then the same with the feed-forward block; all gates start at zero."""

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module, norm: str, *, qk_norm: bool, use_shift: bool, norm2_eps: float) -> None:
        super().__init__()
        self.use_shift = use_shift
        self.norm1 = make_norm(norm, dim)
        # LightningDiT: without RMSNorm, queries and keys are normalised by a LayerNorm with weights and the usual eps
        head_norm = partial(RMSNorm, eps=1e-6) if norm == "rms" else nn.LayerNorm
        self.attn = SelfAttention(dim, num_heads, qkv_bias=True, qk_norm=head_norm if qk_norm else None)
        self.norm2 = make_norm(norm, dim, norm2_eps)
        self.mlp = mlp
        self.modulation = nn.Linear(dim, (6 if use_shift else 4) * dim)

    def forward(self, x: Tensor, modulation: Tensor | None, rotary: Tensor | None, condition: Tensor | None = None) -> Tensor:
        """`modulation` [B, 6C]: shift, scale and gate of attention, then of the feed-forward block; [B, 4C] without shifts. None makes
        it of `condition`."""
        if modulation is None:
            modulation = self.modulation(condition)
        shift1: Tensor | None
        shift2: Tensor | None
        if self.use_shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        else:
            shift1 = shift2 = None
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=1)
        branch = self.attn(modulated(self.norm1, x, shift1, scale1), rotary)
        x, branch = gated_then_modulated(self.norm2, x, gate1, branch, shift2, scale2)
        return add_gated(x, gate2, self.mlp(branch))

    def conditioned(self, x: Tensor, condition: Tensor, rotary: Tensor | None) -> Tensor:
        """The same from silu(c) [B, C]; the layer that makes the modulation is part of the call, as sharded weights need it."""
        return self(x, None, rotary, condition)


class Head(nn.Module):
    """Tokens -> patch * patch * channels values each, the channel fastest."""

    def __init__(self, dim: int, patch: int, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = make_norm(norm, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch * patch * channels)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(modulated(self.norm, x, shift, scale))


class Projector(nn.Module):
    """Hidden states -> the channels of a frozen network's features, through three layers (REPA, section 3.2)."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.silu(self.fc2(F.silu(self.fc1(x)))))
