"""Autoregressive transformer over image tokens (LlamaGen, arXiv:2406.06525 section 3.2): Llama's blocks, rotary positions.

Shapes: B images, N tokens (a grid in raster order, or a sequence that is no grid, as TiTok makes), P prefix positions (1 for a class, the
text length for text), C width, V codebook entries.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genvision.errors import UserError, check_rates, check_sizes
from genvision.kernels.decode import DecodeStep
from genvision.layers.attention import Attention, KVCache
from genvision.layers.checkpointing import Trunk
from genvision.layers.embed import LabelEmbedding, TextEmbedding
from genvision.layers.mlp import SwiGLU, swiglu_hidden_dim
from genvision.layers.norm import RMSNorm
from genvision.layers.rotary import rotary_table, rotary_table_2d
from genvision.layers.token_loss import TokenLosses, TokenTargets, layer_loss
from genvision.models.base import Generator, check_class_dropout


class LlamaGen(Trunk, Generator, ModelMixin, ConfigMixin):
    """Predicts image tokens one after another from a class label or text features.

    Args:
        codebook_size: V.
        grid_size: tokens of a side; N is its square, positions are two-dimensional.
        sequence_length: N of a sequence that is no grid; positions are one-dimensional then, and grid_size has no meaning.
        hidden_dim: C.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None means as many as query heads.
        num_classes: classes; the null label is this number.
        class_dropout: probability of dropping the condition in training; 0 leaves out the null class.
        condition: `class` or `text`.
        text_length: P for text.
        text_dim: channels of the text features.
        mlp_multiple_of: the feed-forward width is rounded up to a multiple of this.
        mlp_multiplier: further factor of that width.
        rope_base: of the rotary frequencies.
        norm_eps: of every RMSNorm.
        token_dropout: element dropout on the embedded sequence.
        attention_dropout: on attention weights.
        residual_dropout: behind the attention's output projection.
        mlp_dropout: behind the feed-forward block.
        drop_path: stochastic depth, rising linearly to this rate; replaces residual and feed-forward dropout.
        init_std: of every linear layer and embedding; the head starts at zero, so the first loss is ln V.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    is_causal = True

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        grid_size: int = 16,
        hidden_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        condition: str = "class",
        text_length: int = 120,
        text_dim: int = 2048,
        mlp_multiple_of: int = 256,
        mlp_multiplier: float | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        drop_path: float = 0.0,
        init_std: float = 0.02,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(codebook_size=codebook_size, grid_size=grid_size, sequence_length=sequence_length, num_classes=num_classes)
        check_sizes(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads, mlp_multiple_of=mlp_multiple_of)
        check_class_dropout(class_dropout)
        check_rates(token_dropout=token_dropout, attention_dropout=attention_dropout)
        check_rates(residual_dropout=residual_dropout, mlp_dropout=mlp_dropout, drop_path=drop_path)
        num_kv_heads = num_kv_heads or num_heads
        if hidden_dim % num_heads or num_heads % num_kv_heads or (hidden_dim // num_heads) % 4:
            raise UserError(
                f"hidden_dim {hidden_dim} must be num_heads {num_heads} times a multiple of 4, and num_kv_heads {num_kv_heads} "
                "must divide num_heads"
            )
        if condition not in ("class", "text"):
            raise UserError(f"condition '{condition}' is unknown; choose class or text")
        self.num_classes, self.has_null_label = num_classes, class_dropout > 0
        self.grid_size = grid_size if sequence_length is None else None
        self.code_shape = (grid_size, grid_size) if sequence_length is None else (sequence_length,)
        self.num_tokens = math.prod(self.code_shape)
        self.num_kv_heads, self.head_dim = num_kv_heads, hidden_dim // num_heads
        self.prefix_length = 1 if condition == "class" else text_length

        self.condition_embed: LabelEmbedding | TextEmbedding
        if condition == "class":
            self.condition_embed = LabelEmbedding(num_classes, hidden_dim, class_dropout)
        else:
            self.condition_embed = TextEmbedding(text_length, text_dim, hidden_dim, class_dropout)
        self.token_embed = nn.Embedding(codebook_size, hidden_dim)
        self.embed_dropout = nn.Dropout(token_dropout)
        mlp_dim = swiglu_hidden_dim(hidden_dim, multiple_of=mlp_multiple_of, multiplier=mlp_multiplier)
        if drop_path > 0:
            residual_dropout = mlp_dropout = 0.0
        self.blocks = nn.ModuleList(
            Block(
                Attention(hidden_dim, num_heads, num_kv_heads, attention_dropout=attention_dropout, dropout=residual_dropout),
                SwiGLU(hidden_dim, mlp_dim, mlp_dropout),
                RMSNorm(hidden_dim, norm_eps),
                RMSNorm(hidden_dim, norm_eps),
                drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = RMSNorm(hidden_dim, norm_eps)
        self.head = nn.Linear(hidden_dim, codebook_size, bias=False)
        # not a buffer: it stays float32 whatever the weights are cast to, and is no part of a checkpoint
        if sequence_length is None:
            self.rotary = rotary_table_2d(grid_size, self.head_dim, base=rope_base, prefix_length=self.prefix_length)
        else:  # the condition has plain positions, too: no checkpoint asks for the zeros that it has before a grid
            positions = torch.arange(self.prefix_length + sequence_length).float().unsqueeze(1)
            self.rotary = rotary_table(positions, self.head_dim, base=rope_base)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        drop: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor | TokenLosses:
        """Logits of the next token after every given one, all in parallel.

        Args:
            codes: the first n < N tokens, int64 [B, n]; n may be 0.
            condition: labels int64 [B], or text features [B, P, F], left-padded.
            condition_mask: [B, P], true where text is no padding.
            drop: boolean [B], whose condition is replaced by the null one; None draws it in training.
            targets: of all n + 1 predictions.

        Returns:
            float32 [B, n + 1, V]; position i is the prediction of token i. With targets, what these predictions cost.
        """
        x = self.embed_dropout(torch.cat([self.condition_embed(condition, drop), self.token_embed(codes)], dim=1))  # [B, P + n, C]
        rotary, mask = self.rotary[: x.shape[1]], self._prefix_mask(condition_mask, x.shape[1])
        x = self.run_blocks(lambda i, x: self.blocks[i](x, rotary, mask), len(self.blocks), x)
        x = self.norm(x[:, self.prefix_length - 1 :])
        return self.head(x).float() if targets is None else layer_loss(self.head, x, targets)

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """See `Generator.hidden_states`; codes int64 [B, h, w] or [B, N], P + N positions a layer."""
        if not self.has_null_label:
            raise UserError("the model was trained without a null condition (class_dropout 0), so it cannot read images without labels")
        num, device = codes.shape[0], codes.device
        condition = torch.zeros(num, dtype=torch.int64, device=device)
        if isinstance(self.condition_embed, TextEmbedding):
            condition = self.condition_embed.null_features.expand(num, -1, -1)
        prefix = self.condition_embed(condition, torch.ones(num, dtype=torch.bool, device=device))
        x = self.embed_dropout(torch.cat([prefix, self.token_embed(codes.flatten(1))], dim=1))  # [B, P + N, C]
        states = {0: x}
        for layer, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x, self.rotary[: x.shape[1]])
            if layer in layers:
                states[layer] = x
        return [states[layer] for layer in layers]

    # Cached generation: `start` once, then `extend` by one token a call.

    def start(
        self, condition: Tensor, condition_mask: Tensor | None = None, drop: Tensor | None = None, codes: Tensor | None = None
    ) -> tuple[Tensor, KVCache]:
        """Read the condition and any known first tokens into a new cache.

        Args:
            condition, condition_mask, drop: as in `forward`.
            codes: known first tokens, int64 [B, n].

        Returns:
            Logits of the next token, float32 [B, V], and the cache.
        """
        x = self.condition_embed(condition, drop)
        if codes is not None:
            x = torch.cat([x, self.token_embed(codes)], dim=1)
        length = self.prefix_length + self.num_tokens - 1  # the last token is never read
        cache = KVCache(len(self.blocks), x.shape[0], self.num_kv_heads, length, self.head_dim, dtype=x.dtype, device=x.device)
        return self._read(x, cache, self._prefix_mask(condition_mask, x.shape[1])), cache

    @torch.no_grad()
    def extend(self, codes: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        """Read one more token of each row, int64 [B]; returns logits of the next, float32 [B, V]."""
        if condition_mask is not None:
            mask = self._prefix_mask(condition_mask, cache.filled + 1)
            assert mask is not None
            return self._read(self.token_embed(codes).unsqueeze(1), cache, mask[:, :, -1:])
        logits = self.step(cache, *self.step_inputs(codes, cache))
        cache.filled += 1
        return logits

    def step_inputs(self, codes: Tensor, cache: KVCache) -> tuple[Tensor, ...]:
        """What `step` reads of new tokens, int64 [B]."""
        return (codes,)

    def step(self, cache: KVCache, codes: Tensor) -> Tensor:
        """`extend` but for its count of what is filled: the same operations on the same memory at every position, so it can be captured."""
        x, decode = self.token_embed(codes), cache.next_position(self.rotary)  # [B, C]
        for layer, block in enumerate(self.blocks):
            x = cast(Block, block).step(x, decode, layer)
        return self.head(self.norm(x)).float()

    def _read(self, x: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        end = cache.filled + x.shape[1]
        rotary = self.rotary[cache.filled : end]
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, mask, cache, layer)
        cache.filled = end
        return self.head(self.norm(x[:, -1])).float()

    def _prefix_mask(self, condition_mask: Tensor | None, length: int) -> Tensor | None:
        """Causal, padding hidden, and every position sees at least itself: [B, 1, length, length]."""
        if condition_mask is None:
            return None
        visible = F.pad(condition_mask.bool(), (0, length - condition_mask.shape[1]), value=True)
        causal = torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=visible.device)
        return ((causal & visible[:, None]) | itself).unsqueeze(1)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.rotary = self.rotary.to(self.token_embed.weight.device)
        return self


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), each dropped as a whole with probability `drop_path` in training."""

    def __init__(self, attention: Attention, mlp: SwiGLU, norm1: RMSNorm, norm2: RMSNorm, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attention = norm1, attention
        self.norm2, self.mlp = norm2, mlp
        self.drop_path = drop_path

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self._thin(self.attention(self.norm1(x), rotary, mask, cache, layer))
        return x + self._thin(self.mlp(self.norm2(x)))

    def step(self, x: Tensor, decode: DecodeStep, layer: int) -> Tensor:
        """One new position of each row, x [B, C], without gradients; see `Attention.step`."""
        x = self.attention.step(self.norm1(x), decode, layer).add_(x)
        return self.mlp(self.norm2(x)).add_(x)

    def _thin(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)
