"""Autoregressive transformer that reads image tokens in any order (RAR, arXiv:2411.00776): it is told which token comes next.

A sequence is [start, class, token, token, ...]; a place counts from 0 at the start, and a token's position is that in the image.

Shapes: B images (rows), N tokens of an image, L places that are read, C width, K codebook entries, M modulation values of a block,
U classes that differ.
"""

import math
from collections.abc import Sequence
from functools import partial
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
from genvision.layers.embed import LabelEmbedding
from genvision.layers.nested import NestedMLP
from genvision.layers.token_loss import TokenLosses, TokenTargets, layer_loss
from genvision.models.base import Generator, check_class_dropout

PREFIX = 2
"""Places before the tokens: start and class."""
PLACES_AT_ONCE = 16
"""Places of cached generation whose modulation is computed together: its weights, a third of all, are then read once for all of them
(1.2 to 1.3 times the speed on a CPU core)."""

make_norm = partial(nn.LayerNorm, eps=1e-6)


class RAR(Trunk, Generator, ModelMixin, ConfigMixin):
    """Predicts image tokens one after another, in raster or any other order; the defaults are RAR-B.

    Sizes are hidden_dim, depth, mlp_dim, with 16 heads: B 768, 24, 3072; L 1024, 24, 4096; XL 1280, 32, 5120; XXL 1408, 40, 6144.

    Args:
        codebook_size: K.
        grid_size: tokens of a side; N is its square.
        hidden_dim: C.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: width of the feed-forward blocks; None means 4 C.
        num_classes: classes; the null label is this number.
        class_dropout: probability of dropping the label in training; 0 leaves out the null class.
        attention_dropout: on attention weights.
        residual_dropout: behind the attention's output projection.
        mlp_dropout: behind both layers of the feed-forward block.
        init_std: of every linear layer and table, cut at 2; modulations start at zero, so that a fresh block is the identity.
        sequence_length: N of a sequence that is no grid; grid_size has no meaning then.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    is_causal = True
    prefix_length = PREFIX

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        grid_size: int = 16,
        hidden_dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        init_std: float = 0.02,
        sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        mlp_dim = 4 * hidden_dim if mlp_dim is None else mlp_dim
        check_sizes(codebook_size=codebook_size, grid_size=grid_size, sequence_length=sequence_length, num_classes=num_classes)
        check_sizes(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
        check_class_dropout(class_dropout)
        check_rates(attention_dropout=attention_dropout, residual_dropout=residual_dropout, mlp_dropout=mlp_dropout)
        if hidden_dim % num_heads:
            raise UserError(f"hidden_dim {hidden_dim} must be a multiple of num_heads {num_heads}")
        self.num_classes, self.has_null_label = num_classes, class_dropout > 0
        self.code_shape = (grid_size, grid_size) if sequence_length is None else (sequence_length,)
        self.num_tokens = math.prod(self.code_shape)

        self.start_token = nn.Parameter(torch.zeros(hidden_dim))
        self.label_embed = LabelEmbedding(num_classes, hidden_dim, class_dropout)
        self.token_embed = nn.Embedding(codebook_size, hidden_dim)
        # rows: start, class, then the positions of the image in raster order
        self.position_table = nn.Parameter(torch.empty(PREFIX + self.num_tokens, hidden_dim))
        self.next_position_table = nn.Parameter(torch.empty(self.num_tokens, hidden_dim))
        self.place_table = nn.Parameter(torch.empty(PREFIX + self.num_tokens, hidden_dim))
        self.blocks = nn.ModuleList(
            Block(
                Attention(
                    hidden_dim,
                    num_heads,
                    num_heads,
                    bias=True,
                    qk_norm=make_norm,
                    attention_dropout=attention_dropout,
                    dropout=residual_dropout,
                ),
                NestedMLP(hidden_dim, mlp_dim, dropout=mlp_dropout),
                hidden_dim,
            )
            for _ in range(depth)
        )
        self.head = Head(hidden_dim, codebook_size)
        self._initialize(init_std)

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        orders: Tensor | None = None,
        drop: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor | TokenLosses:
        """Logits of every token, each from those before it in the order, all in parallel.

        Args:
            codes: int64 [B, N] or [B, h, w], in raster order.
            labels: int64 [B]; `null_label` for none.
            orders: int64 [B, N], the positions of each image in the order in which they are read; None is raster.
            drop: boolean [B], whose label is replaced by the null one; None draws it in training.
            targets: of all predictions, in the order in which they are made.

        Returns:
            float32 [B, N, K]; entry i is the prediction of the token at position orders[:, i]. With targets, what these predictions cost.
        """
        codes = codes.flatten(1)
        orders = self._raster(codes) if orders is None else orders
        label = self.label_embed(labels, drop)  # [B, 1, C]
        x = self._sequence(codes.gather(1, orders)[:, :-1], label, orders)  # [B, L, C]; the last token is never read
        condition = self._condition(label, x.shape[1])
        blocks = self._each_block()
        x = self.run_blocks(lambda i, x: blocks[i].conditioned(x, condition), len(blocks), x)
        modulation = self.head.modulation(condition[:, 1:])
        if targets is None:
            return self.head(x[:, 1:], modulation).float()
        return layer_loss(self.head.linear, self.head.read(x[:, 1:], modulation), targets)

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """See `Generator.hidden_states`; raster order, [B, 2 + N, C] a layer."""
        if not self.has_null_label:
            raise UserError("the model was trained without a null condition (class_dropout 0), so it cannot read images without labels")
        codes = codes.flatten(1)
        label = self.label_embed(torch.full_like(codes[:, 0], self.null_label))
        x = self._sequence(codes, label, self._raster(codes))
        condition = self._condition(label, x.shape[1])
        states = {0: x}
        for layer, block in enumerate(self._each_block()[: max(layers)], start=1):
            x = block.conditioned(x, condition)
            if layer in layers:
                states[layer] = x
        return [states[layer] for layer in layers]

    # Cached generation in raster order: `start` once, then `extend` by one token a call.

    def start(
        self, condition: Tensor, condition_mask: None = None, drop: Tensor | None = None, codes: Tensor | None = None
    ) -> tuple[Tensor, "ConditionedCache"]:
        """Read the class and any known first tokens into a new cache.

        Args:
            condition: labels int64 [B].
            condition_mask: of text, which this model does not read.
            drop: as in `forward`.
            codes: known first tokens, int64 [B, n].

        Returns:
            Logits of the next token, float32 [B, K], and the cache.
        """
        labels = condition if drop is None else torch.where(drop, self.null_label, condition)
        label = self.label_embed.table(labels).unsqueeze(1)  # [B, 1, C]
        codes = labels.new_empty(len(labels), 0) if codes is None else codes
        x = self._sequence(codes, label, self._raster(codes))
        attention = self._each_block()[0].attention
        cache = ConditionedCache(
            len(self.blocks),
            x.shape[0],
            attention.num_heads,
            PREFIX + self.num_tokens - 1,  # the last token is never read
            attention.head_dim,
            dtype=x.dtype,
            device=x.device,
            labels=labels,
        )
        told = self._condition(label, x.shape[1])
        return self._read(x, [block.modulation(told) for block in self._each_block()], self.head.modulation(told[:, -1:]), cache), cache

    @torch.no_grad()
    def extend(self, codes: Tensor, cache: "ConditionedCache", condition_mask: None = None) -> Tensor:
        """Read one more token of each row, int64 [B]; returns logits of the next, float32 [B, K]."""
        logits = self.step(cache, *self.step_inputs(codes, cache))
        cache.filled += 1
        return logits

    def step_inputs(self, codes: Tensor, cache: "ConditionedCache") -> tuple[Tensor, ...]:
        """What `step` reads of new tokens, int64 [B], and of their place: embeddings [B, C], modulations of the blocks [depth, B, 6 C] and
        of the head [B, 2 C]."""
        place = cache.filled
        x = self.token_embed(codes) + self.position_table[place] + self.next_position_table[place - PREFIX + 1]
        if not cache.holds(place):
            stop = min(place + PLACES_AT_ONCE, PREFIX + self.num_tokens - 1)
            cache.hold(place, *self._modulations(self.label_embed.table(cache.each_label), place, stop))
        return (x, *cache.modulations(place))

    def step(self, cache: "ConditionedCache", x: Tensor, of_blocks: Tensor, of_head: Tensor) -> Tensor:
        """`extend` but for its count of what is filled: the same operations on the same memory at every position, so it can be captured."""
        decode = cache.next_position(None)
        for layer, (block, modulation) in enumerate(zip(self._each_block(), of_blocks, strict=True)):
            x = block.step(x, modulation, decode, layer)
        return self.head(x, of_head).float()

    def _read(self, x: Tensor, of_blocks: Sequence[Tensor], of_head: Tensor, cache: KVCache) -> Tensor:
        for layer, (block, modulation) in enumerate(zip(self._each_block(), of_blocks, strict=True)):
            x = block(x, modulation, cache, layer)
        cache.filled += x.shape[1]
        return self.head(x[:, -1:], of_head).squeeze(1).float()

    def _modulations(self, label: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of the blocks, [depth, U, places, M], and of the head, [U, places, 2 C], from the vectors of U classes, [U, C]."""
        condition = F.silu(label.unsqueeze(1) + self.place_table[start:stop])
        return torch.stack([block.modulation(condition) for block in self._each_block()]), self.head.modulation(condition)

    def _condition(self, label: Tensor, length: int) -> Tensor:
        """What modulates each place, from the class [B, 1, C]: [B, L, C]."""
        return F.silu(label + self.place_table[:length])

    def _sequence(self, codes: Tensor, label: Tensor, orders: Tensor) -> Tensor:
        """The first n tokens of an order, int64 [B, n], behind start and class: [B, 2 + n, C]."""
        rows, num = codes.shape
        x = torch.cat([self.start_token.expand(rows, 1, -1), label, self.token_embed(codes)], dim=1)
        own = F.embedding(orders[:, :num], self.position_table[PREFIX:])
        following = F.embedding(orders[:, : num + 1], self.next_position_table)
        # the start is told nothing of what follows, and nothing follows the last token
        following = F.pad(following, (0, 0, 1, num + 1 - following.shape[1]))
        return x + following + torch.cat([self.position_table[:PREFIX].expand(rows, -1, -1), own], dim=1)

    def _raster(self, codes: Tensor) -> Tensor:
        return torch.arange(self.num_tokens, device=codes.device).expand(len(codes), -1)

    def _each_block(self) -> "list[Block]":
        """The blocks in their order, for the type checker."""
        return [cast(Block, block) for block in self.blocks]

    def _initialize(self, std: float) -> None:
        tables = [self.position_table, self.next_position_table, self.place_table]
        layers = [module for module in self.modules() if isinstance(module, nn.Linear | nn.Embedding)]
        for weight in [*tables, *(layer.weight for layer in layers)]:
            nn.init.trunc_normal_(weight, std=std)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        for modulation in [*(block.modulation for block in self._each_block()), self.head.modulation]:
            nn.init.zeros_(modulation.weight)


class ConditionedCache(KVCache):
    """Keys and values, and how the classes of the rows modulate the next places; classes that rows share are computed once.

    Args:
        labels: the class of each row, int64 [B]; the null label is one of them.
    """

    def __init__(
        self, depth: int, rows: int, num_heads: int, length: int, head_dim: int, *, dtype: torch.dtype, device: torch.device, labels: Tensor
    ) -> None:
        super().__init__(depth, rows, num_heads, length, head_dim, dtype=dtype, device=device)
        self._set_labels(labels)

    def _set_labels(self, labels: Tensor) -> None:
        self.each_label, self.row_label = labels.unique(return_inverse=True)  # int64 [U], and for each row which of them, [B]
        self.held: tuple[int, Tensor, Tensor] | None = None

    def holds(self, place: int) -> bool:
        return self.held is not None and self.held[0] <= place < self.held[0] + self.held[2].shape[1]

    def hold(self, place: int, of_blocks: Tensor, of_head: Tensor) -> None:
        """Keep the modulations of some places from this one on, as `RAR._modulations` gives them."""
        self.held = place, of_blocks, of_head

    def modulations(self, place: int) -> tuple[Tensor, Tensor]:
        """Of the blocks, [depth, B, M], and of the head, [B, 2 C]."""
        assert self.held is not None
        start, of_blocks, of_head = self.held
        return of_blocks[:, self.row_label, place - start], of_head[self.row_label, place - start]

    def first_rows(self, rows: int) -> "ConditionedCache":
        part = super().first_rows(rows)
        part.row_label = self.row_label[:rows]
        return part

    def joined(self, other: "ConditionedCache") -> "ConditionedCache":
        both = super().joined(other)
        both._set_labels(torch.cat([self.each_label[self.row_label], other.each_label[other.row_label]]))
        return both


class Block(nn.Module):
    """x + gate * attention(modulated norm x), then the same with the feed-forward block; every place has its own modulation."""

    def __init__(self, attention: Attention, mlp: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1, self.attention = make_norm(dim), attention
        self.norm2, self.mlp = make_norm(dim), mlp
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, modulation: Tensor | None, cache: KVCache | None = None, layer: int = 0, condition: Tensor | None = None
    ) -> Tensor:
        """`modulation` [B, L, 6 C]: shift, scale and gate of attention, then of the feed-forward block; None makes it of `condition`."""
        if modulation is None:
            modulation = self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x.addcmul(gate1, self.attention(shift1.addcmul(self.norm1(x), 1 + scale1), cache=cache, layer=layer))
        return x.addcmul(gate2, self.mlp(shift2.addcmul(self.norm2(x), 1 + scale2)))

    def step(self, x: Tensor, modulation: Tensor, decode: DecodeStep, layer: int) -> Tensor:
        """One new place of each row, x [B, C] and modulation [B, 6 C], without gradients; see `Attention.step`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x.addcmul(gate1, self.attention.step(shift1.addcmul(self.norm1(x), 1 + scale1), decode, layer))
        return x.addcmul(gate2, self.mlp(shift2.addcmul(self.norm2(x), 1 + scale2)))

    def conditioned(self, x: Tensor, condition: Tensor) -> Tensor:
        """The same from silu(c) [B, L, C]; the layer that makes the modulation is part of the call, as sharded weights need it."""
        return self(x, None, condition=condition)


class Head(nn.Module):
    """Modulated norm and a linear layer; here the scale comes before the shift."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.norm = make_norm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, codebook_size)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.linear(self.read(x, modulation))

    def read(self, x: Tensor, modulation: Tensor) -> Tensor:
        """What the linear layer reads."""
        scale, shift = modulation.chunk(2, dim=-1)
        return shift.addcmul(self.norm(x), 1 + scale)
