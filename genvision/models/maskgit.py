"""Bidirectional transformer over image tokens: MaskGIT (arXiv:2202.04200) and its descendants, one network with switches.

Shapes: B rows, N tokens (a grid in raster order, or a sequence that is no grid), P class tokens in front of them (0 or 1), R registers
behind them, C width, K codebook entries, Q tokens that are read anew, M tokens that are predicted.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import silu

from genvision.errors import UserError, check_rates, check_sizes
from genvision.layers.checkpointing import Trunk
from genvision.layers.embed import LabelEmbedding
from genvision.layers.mlp import swiglu_hidden_dim
from genvision.layers.nested import NestedAttention, NestedMLP, NestedSwiGLU, TokenCache
from genvision.layers.token_loss import TokenLosses, TokenTargets, head_loss, layer_loss
from genvision.models.base import check_class_dropout
from genvision.models.masked import MaskedGenerator, positions_within
from genvision.models.maskgit_blocks import ModulatedBlock, ModulatedNorm, PostNormBlock, PreNormBlock, TiedHead

BLOCKS = {"post_norm": PostNormBlock, "pre_norm": PreNormBlock, "modulated": ModulatedBlock}
CHOICES = {"block": tuple(BLOCKS), "mlp": ("gelu", "gelu_tanh", "swiglu"), "head": ("linear", "tied", "mlm")}


class MaskGIT(Trunk, MaskedGenerator, ModelMixin, ConfigMixin):
    """Predicts unknown image tokens from all known ones and a class; the defaults are Halton-MaskGIT-B (arXiv:2503.17076).

    Of the published networks that one is the default for training from scratch: blocks that start as the identity and normalised queries
    and keys need no care about the learning rate, and the class reaches every block. The others are, beside their sizes:
    MaskGIT post_norm, gelu_tanh, mlm; ImageBert of TiTok post_norm, gelu, linear; its UViTBert pre_norm, gelu, linear with use_skips.
    All three have no registers and no use_qk_norm, the first two use_qkv_bias and norm_eps 1e-12.

    Args:
        codebook_size: K.
        grid_size: tokens of a side; N is its square.
        hidden_dim: C.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head; unless told hidden_dim / num_heads, rounded down.
        mlp_ratio: width of the feed-forward block over C (SwiGLU takes two thirds of it).
        mlp_multiple_of: the width of SwiGLU is rounded up to a multiple of this.
        num_classes: classes; the null label is this number.
        class_dropout: probability of dropping the label in training; 0 leaves out the null class.
        block: `post_norm` or `pre_norm` (LayerNorm, a class token in front of the image), or `modulated` (RMSNorm shifted, scaled and
            gated by the class, attention without biases).
        mlp: `gelu` or `gelu_tanh` with biases, or `swiglu`.
        head: `linear`, `tied` (products with the token embeddings), or `mlm` (the same behind another layer, as in BERT).
        use_skips: the first half of the blocks feeds the second (U-ViT, arXiv:2209.12152); depth must be odd.
        use_qk_norm: normalise queries and keys over all heads together.
        use_qkv_bias: biases of queries, keys and values.
        num_registers: learned tokens behind the image that nothing is predicted for (arXiv:2309.16588).
        norm_eps: of every norm.
        dropout: element dropout behind the embeddings, the attention and the feed-forward block.
        attention_dropout: on attention weights.
        init_std: of every linear layer and embedding, cut at two deviations; modulations start at zero.
        sequence_length: N of a sequence that is no grid; grid_size has no meaning then.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PostNormBlock", "PreNormBlock", "ModulatedBlock")

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        grid_size: int = 16,
        hidden_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        mlp_multiple_of: int = 256,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        block: str = "modulated",
        mlp: str = "swiglu",
        head: str = "tied",
        use_skips: bool = False,
        use_qk_norm: bool = True,
        use_qkv_bias: bool = False,
        num_registers: int = 1,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        init_std: float = 0.02,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(codebook_size=codebook_size, grid_size=grid_size, sequence_length=sequence_length, num_classes=num_classes)
        check_sizes(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads, head_dim=head_dim, mlp_multiple_of=mlp_multiple_of)
        check_class_dropout(class_dropout)
        check_rates(dropout=dropout, attention_dropout=attention_dropout)
        for name, choice in {"block": block, "mlp": mlp, "head": head}.items():
            if choice not in CHOICES[name]:
                raise UserError(f"{name} '{choice}' is unknown; choose one of {', '.join(CHOICES[name])}")
        if not norm_eps > 0:
            raise UserError(f"norm_eps must be above 0, got {norm_eps}")
        if num_registers < 0:
            raise UserError(f"num_registers must be at least 0, got {num_registers}")
        if use_skips and depth % 2 == 0:
            raise UserError(f"depth {depth} must be odd for use_skips: as many blocks before the middle one as behind it")
        if head_dim is None and num_heads > hidden_dim:
            raise UserError(f"num_heads {num_heads} must be at most hidden_dim {hidden_dim}, unless head_dim is told")
        self.codebook_size, self.num_classes, self.has_null_label = codebook_size, num_classes, class_dropout > 0
        self.code_shape = (grid_size, grid_size) if sequence_length is None else (sequence_length,)
        self.num_tokens, self.num_heads = math.prod(self.code_shape), num_heads
        self.prefix_length = 0 if block == "modulated" else 1
        self.hidden_units = (
            swiglu_hidden_dim(hidden_dim, multiple_of=mlp_multiple_of, multiplier=mlp_ratio / 4)
            if mlp == "swiglu"
            else round(mlp_ratio * hidden_dim)
        )
        if self.hidden_units < 1:
            raise UserError(f"mlp_ratio must leave a width of at least 1, got {mlp_ratio}")

        self.token_embed = nn.Embedding(codebook_size + 1, hidden_dim)  # the last row is that of unknown tokens
        self.label_embed = LabelEmbedding(num_classes, hidden_dim, class_dropout)
        self.position_embed = nn.Parameter(torch.zeros(self.prefix_length + self.num_tokens, hidden_dim))
        self.registers = nn.Parameter(torch.zeros(num_registers, hidden_dim)) if num_registers else None
        self.embed_norm = nn.LayerNorm(hidden_dim, norm_eps) if block == "post_norm" else nn.Identity()
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BLOCKS[block](
                hidden_dim,
                NestedAttention(
                    hidden_dim,
                    num_heads,
                    head_dim=head_dim,
                    qkv_bias=use_qkv_bias,
                    proj_bias=block != "modulated",
                    normalize_qk=use_qk_norm,
                    attention_dropout=attention_dropout,
                    dropout=dropout,
                ),
                NestedSwiGLU(hidden_dim, self.hidden_units, dropout)
                if mlp == "swiglu"
                else NestedMLP(
                    hidden_dim,
                    self.hidden_units,
                    activation="gelu" if mlp == "gelu" else "gelu_tanh",
                    dropout=dropout,
                    hidden_dropout=0.0,
                ),
                norm_eps,
            )
            for _ in range(depth)
        )
        self.skip_layers = nn.ModuleList(nn.Linear(2 * hidden_dim, hidden_dim) for _ in range(depth // 2 if use_skips else 0))
        self.norm: nn.Module | None = None
        if block != "post_norm":
            self.norm = ModulatedNorm(hidden_dim, norm_eps) if block == "modulated" else nn.LayerNorm(hidden_dim, norm_eps)
        self.to_logits: TiedHead | nn.Linear
        if head == "linear":
            self.vocabulary_size = codebook_size
            self.to_logits = nn.Linear(hidden_dim, codebook_size)
        elif head == "tied":
            self.vocabulary_size = codebook_size + 1
            self.to_logits = TiedHead(hidden_dim, self.vocabulary_size)
        else:  # classes are words like any other
            self.vocabulary_size = codebook_size + 1 + self.label_embed.table.num_embeddings
            self.to_logits = TiedHead(hidden_dim, self.vocabulary_size, norm_eps)
        self._initialize(init_std)

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        where: Tensor | None = None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        fresh: Tensor | None = None,
        targets: TokenTargets | None = None,
        whole_vocabulary: bool = False,
    ) -> Tensor | TokenLosses:
        """See `MaskedGenerator.forward`; with `fresh` and without `where`, logits of the tokens that are read.

        Args:
            whole_vocabulary: logits of all that the original implementations predict, [B, M, vocabulary_size]: behind the codes, heads
                that are tied know the unknown token, and `mlm` the classes as well.
        """
        self.check_nesting(nesting)
        x, condition = self._embed(codes.flatten(1), labels, drop, fresh)
        x = self._run(x, condition, nesting=nesting, cache=cache, rows=None if fresh is None else self._rows(fresh))
        if where is None:
            x = x[:, self.prefix_length : x.shape[1] - self.config.num_registers]
        else:
            index = self.prefix_length + (where if fresh is None else positions_within(fresh, where))
            x = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, M, C]
        if self.norm is not None:
            x = self.norm(x, condition) if isinstance(self.norm, ModulatedNorm) else self.norm(x)
        return self._predict(x, whole_vocabulary).float() if targets is None else self._loss(x, targets)

    def multiply_adds(self, num_read: int, num_predicted: int, nesting: int = 1) -> int:
        """See `MaskedGenerator.multiply_adds`."""
        outside = self.prefix_length + self.config.num_registers
        num_queries, num_keys = outside + num_read, outside + self.num_tokens
        count = sum(cast(PostNormBlock, block).multiply_adds(num_queries, num_keys, nesting) for block in self.blocks)
        count += sum(num_queries * cast(nn.Linear, layer).weight.numel() for layer in self.skip_layers)
        if isinstance(self.norm, ModulatedNorm):
            count += self.norm.modulation.weight.numel()
        if isinstance(self.to_logits, TiedHead) and self.to_logits.dense is not None:
            count += num_predicted * self.to_logits.dense.weight.numel()
        return count + num_predicted * self.codebook_size * self.token_embed.embedding_dim

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """See `Generator.hidden_states`; codes int64 [B, h, w] or [B, N], all of them known; P + N positions a layer."""
        if not self.has_null_label:
            raise UserError("the model was trained without a null condition (class_dropout 0), so it cannot read images without labels")
        labels = torch.full((codes.shape[0],), self.null_label, device=codes.device)
        x, condition = self._embed(codes.flatten(1), labels, torch.ones_like(labels, dtype=torch.bool), None)
        states = [x]
        self._run(x, condition, states=states, depth=max(layers))
        return [states[layer][:, : self.prefix_length + self.num_tokens] for layer in layers]

    def _embed(self, codes: Tensor, labels: Tensor, drop: Tensor | None, fresh: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the first block reads, [B, P + Q + R, C], and silu of the condition [B, C] of modulated blocks."""
        label = self.label_embed(labels, drop)  # [B, 1, C]
        positions = self.position_embed[self.prefix_length :]
        if fresh is not None:
            codes, positions = codes.gather(1, fresh), positions[fresh]
        parts = [self.token_embed(codes) + positions]
        if self.prefix_length:
            parts.insert(0, label + self.position_embed[0])
        if self.registers is not None:
            parts.append(self.registers.expand(codes.shape[0], -1, -1))
        x = self.embed_dropout(self.embed_norm(torch.cat(parts, dim=1)))
        return x, None if self.prefix_length else silu(label.squeeze(1))

    def _rows(self, fresh: Tensor) -> Tensor:
        """Where all that is read stands in the whole sequence: the class token, the tokens `fresh`, the registers; int64 [B, P + Q + R]."""
        end = self.prefix_length + self.num_tokens
        places = torch.arange(end + self.config.num_registers, device=fresh.device).expand(fresh.shape[0], -1)
        return torch.cat([places[:, : self.prefix_length], fresh + self.prefix_length, places[:, end:]], dim=1)

    def _run(
        self,
        x: Tensor,
        condition: Tensor | None,
        *,
        nesting: int = 1,
        cache: TokenCache | None = None,
        rows: Tensor | None = None,
        states: list[Tensor] | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Through the first `depth` blocks, or all; what each of them gives is added to `states`."""
        middle, num = len(self.skip_layers), len(self.blocks[:depth])

        def call(i: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """State is what the block reads, and before it what earlier ones left for later ones."""
            *skips, x = state
            if middle and i > middle:
                x = self.skip_layers[i - middle - 1](torch.cat([x, skips.pop()], dim=-1))
            x = self.blocks[i](x, condition, nesting, cache, i, rows)
            if i < middle:
                skips.append(x)
            return *skips, x

        state: tuple[Tensor, ...] = (x,)
        if states is None:
            return self.run_blocks(call, num, state, writes_cache=cache is not None)[-1]
        for i in range(num):
            state = call(i, state)
            states.append(state[-1])
        return state[-1]

    def _predict(self, x: Tensor, whole_vocabulary: bool) -> Tensor:
        """Normalised hidden states [B, M, C] -> logits [B, M, K], or [B, M, vocabulary_size]."""
        if not isinstance(self.to_logits, TiedHead):
            return self.to_logits(x)
        table = self.token_embed.weight
        if not whole_vocabulary:
            return self.to_logits(x, table, self.codebook_size)
        return self.to_logits(x, torch.cat([table, self.label_embed.table.weight]), self.vocabulary_size)

    def _loss(self, x: Tensor, targets: TokenTargets) -> TokenLosses:
        """Of the logits of the codes, from the same."""
        if not isinstance(self.to_logits, TiedHead):
            return layer_loss(self.to_logits, x, targets)
        count = self.codebook_size
        return head_loss(self.to_logits.read(x), self.token_embed.weight[:count], self.to_logits.bias[:count], targets)

    def _initialize(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.position_embed, self.registers):
            if table is not None:
                nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)
        for module in self.modules():
            if isinstance(module, ModulatedBlock | ModulatedNorm):
                nn.init.zeros_(module.modulation.weight)
