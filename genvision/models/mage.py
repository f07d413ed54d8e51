"""Masked generative encoder (MAGE, arXiv:2211.09117): an encoder that sees a part of the tokens, and a decoder that predicts the others.

One network for images and for representations; the share of tokens that are masked varies from a half to all of them in training.

Shapes: B images, N tokens, K codebook entries, S class slots, C width of the encoder, D of the decoder, Q tokens that are read.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genvision.errors import UserError, check_rates, check_sizes
from genvision.layers.checkpointing import Trunk
from genvision.layers.nested import NestedAttention, NestedMLP, TokenCache
from genvision.layers.token_loss import TokenTargets, head_loss
from genvision.models.masked import MaskedGenerator, positions_within

INIT_STD = 0.02
"""Of the word table and the position tables; linear layers start Xavier-uniform with zero biases."""


class MAGE(Trunk, MaskedGenerator, ModelMixin, ConfigMixin):
    """Predicts masked tokens from the others; the defaults are ViT-B, told a class.

    Sizes are hidden_dim, depth, num_heads; decoder_dim, decoder_depth, decoder_num_heads: B 768, 12, 12; 768, 8, 16. L 1024, 24, 16; 1024,
    8, 16. The published models know no classes; a label in the class token's place is our extension.

    Args:
        codebook_size: K.
        grid_size: tokens of a side; N is its square.
        sequence_length: N of a sequence that is no grid; grid_size has no meaning then.
        hidden_dim: C.
        depth: blocks of the encoder.
        num_heads: attention heads of the encoder.
        decoder_dim: D.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        mlp_ratio: width of the feed-forward blocks over C and D.
        norm_eps: of the norms of blocks, encoder and decoder.
        num_classes: classes; the null label is this number.
        class_dropout: probability of dropping the label in training; at 1 every label is the null one, and the model is unconditional.
        class_slots: S, rows of the word table between codes and mask; None is num_classes + 1, and 1000 in published weights.
        null_slot: the slot of the null label; None is num_classes, and 76 in published weights.
        dropout: of embedded tokens, attention weights, and behind every layer of attention and feed-forward blocks.
        contrastive_dim: channels of a projection of the image's mean token, for a contrastive loss (MAGE-C); 0 is off.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    prefix_length = 1

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        grid_size: int = 16,
        sequence_length: int | None = None,
        hidden_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        class_slots: int | None = None,
        null_slot: int | None = None,
        dropout: float = 0.1,
        contrastive_dim: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(codebook_size=codebook_size, grid_size=grid_size, sequence_length=sequence_length, num_classes=num_classes)
        check_sizes(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads)
        check_sizes(decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads)
        check_rates(class_dropout=class_dropout, dropout=dropout)
        for prefix, dim, heads in (("", hidden_dim, num_heads), ("decoder_", decoder_dim, decoder_num_heads)):
            if dim % heads:
                raise UserError(f"{prefix}num_heads {heads} must divide {prefix or 'hidden_'}dim {dim}")
            if int(dim * mlp_ratio) < 1:
                raise UserError(f"mlp_ratio {mlp_ratio} leaves no hidden unit of {dim}; the usual ratio is 4")
        if contrastive_dim < 0:
            raise UserError(f"contrastive_dim must be at least 0, got {contrastive_dim}")
        self.num_classes, self.class_dropout = num_classes, class_dropout
        self.has_null_label, self.is_unconditional = class_dropout > 0, class_dropout == 1
        slots = num_classes + 1 if class_slots is None else class_slots
        null = num_classes if null_slot is None else null_slot
        taken = 0 if self.is_unconditional else num_classes  # the labels' own slots
        if not taken <= null < slots:
            raise UserError(f"null_slot {null} must lie in {taken} .. {slots - 1}, behind the slots of the classes and below class_slots")
        self.codebook_size = codebook_size
        self.code_shape = (grid_size, grid_size) if sequence_length is None else (sequence_length,)
        self.num_tokens = math.prod(self.code_shape)
        self.null_word, self.mask_word = codebook_size + null, codebook_size + slots
        self.num_heads, self.hidden_units = num_heads, int(hidden_dim * mlp_ratio)
        self.decoder_heads, self.decoder_units = decoder_num_heads, int(decoder_dim * mlp_ratio)

        self.words = nn.Embedding(codebook_size + slots + 1, hidden_dim)  # codes, class slots, mask
        self.positions = nn.Parameter(torch.empty(1 + self.num_tokens, hidden_dim))
        self.embed_norm = nn.LayerNorm(hidden_dim, 1e-6)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden_dim, num_heads, self.hidden_units, norm_eps, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_dim, norm_eps)
        self.decoder_embed = nn.Linear(hidden_dim, decoder_dim)
        self.decoder_positions = nn.Parameter(torch.empty(1 + self.num_tokens, decoder_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_num_heads, self.decoder_units, norm_eps, dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, norm_eps)
        self.head = Head(decoder_dim, hidden_dim, codebook_size)
        self.projector = Projector(hidden_dim, contrastive_dim) if contrastive_dim else None

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.words.weight, self.positions, self.decoder_positions):
            nn.init.normal_(table, std=INIT_STD)

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        kept: Tensor | None = None,
        drop: Tensor | None = None,
        where: Tensor | None = None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        fresh: Tensor | None = None,
        targets: TokenTargets | None = None,
        with_features: bool = False,
    ) -> Any:
        """Logits of tokens, or what they cost, see `MaskedGenerator.forward` for the arguments that are not explained here.

        Args:
            kept: int64 [B, Q], ascending, the tokens that the encoder sees in training, known or masked; None is all. Not with a cache.
            with_features: give what the encoder makes of the tokens, too.

        Returns:
            float32 [B, M, K], or `TokenLosses`; with features, also the encoder's normalised outputs [B, 1 + Q, C] of the class token and
            the tokens that it saw, or, with contrastive_dim Z, the projection of these tokens' mean, [B, Z].
        """
        assert kept is None or cache is None, "a cache holds all tokens"
        codes, read = codes.flatten(1), kept if fresh is None else fresh
        rows = None if read is None else F.pad(read + 1, (1, 0))  # the class token is always read
        x = self._embed(codes, labels, drop, rows)
        x = self._run(self.blocks, x, nesting, cache, 0, rows)
        features = self.norm(x)  # [B, 1 + Q, C]

        x = self.decoder_embed(features)
        class_token = x[:, :1]
        masked = (codes if read is None else codes.gather(1, read)) == self.mask_id
        x = torch.cat([class_token, torch.where(masked.unsqueeze(-1), class_token, x[:, 1:])], dim=1)  # [B, 1 + Q, D]
        if kept is not None and rows is not None:  # what the encoder did not see looks like what is masked
            x = class_token.expand(-1, 1 + self.num_tokens, -1).scatter(1, rows.unsqueeze(-1).expand_as(x), x)
        x = x + (self.decoder_positions if fresh is None else self.decoder_positions[rows])
        x = self._run(self.decoder_blocks, x, nesting, cache, len(self.blocks), rows)[:, 1:]
        if where is not None:
            chosen = where if fresh is None else positions_within(fresh, where)
            x = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, M, D]
        x = self.decoder_norm(x)
        if targets is None:
            predicted = self.head(x, self.words.weight)
        else:
            predicted = head_loss(self.head.read(x), self.head.known_words(self.words.weight), self.head.bias, targets)
        if not with_features:
            return predicted
        return predicted, features if self.projector is None else self.projector(features[:, 1:].mean(1))

    def hidden_states(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """See `Generator.hidden_states`: the encoder's blocks, without its last norm; codes int64 [B, h, w] or [B, N], 1 + N positions.

        The mean of the last layer over the image's positions is what MAGE's linear probe reads (section 4.2).
        """
        if not self.has_null_label:
            raise UserError("the model was trained without a null condition (class_dropout 0), so it cannot read images without labels")
        x = self._embed(codes.flatten(1), torch.full((codes.shape[0],), self.null_label, device=codes.device), None, None)
        states = {0: x}
        for layer, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x)
            if layer in layers:
                states[layer] = x
        return [states[layer] for layer in layers]

    def multiply_adds(self, num_read: int, num_predicted: int, nesting: int = 1) -> int:
        """See `MaskedGenerator.multiply_adds`."""
        queries, keys = 1 + num_read, 1 + self.num_tokens
        total = queries * self.decoder_embed.in_features * self.decoder_embed.out_features
        for block in (*self.blocks, *self.decoder_blocks):
            assert isinstance(block, Block)
            total += block.attention.multiply_adds(queries, keys, nesting) + block.mlp.multiply_adds(queries, nesting)
        return total + num_predicted * self.head.fc.out_features * (self.head.fc.in_features + self.codebook_size)

    def check_nesting(self, nesting: int) -> None:
        """See `MaskedGenerator.check_nesting`; encoder and decoder are both nested."""
        sizes = (self.num_heads, self.decoder_heads, self.hidden_units, self.decoder_units)
        if nesting < 1 or any(size % nesting for size in sizes):
            raise UserError(
                f"nesting {nesting} is not possible; it must divide the {sizes[0]} and {sizes[1]} heads and the {sizes[2]} and {sizes[3]} "
                "hidden units of encoder and decoder"
            )

    def _embed(self, codes: Tensor, labels: Tensor, drop: Tensor | None, rows: Tensor | None) -> Tensor:
        """Codes [B, N] behind their class token, all or those at `rows`: [B, 1 + Q, C]."""
        words = torch.where(codes == self.mask_id, self.mask_word, codes)
        words = torch.cat([self._class_words(labels, drop), words], dim=1)  # [B, 1 + N]
        if rows is None:
            x = self.words(words) + self.positions
        else:
            x = self.words(words.gather(1, rows)) + self.positions[rows]
        return self.embed_dropout(self.embed_norm(x))

    def _class_words(self, labels: Tensor, drop: Tensor | None) -> Tensor:
        """Rows of the word table for labels [B]: [B, 1]."""
        if self.is_unconditional:
            return torch.full_like(labels, self.null_word).unsqueeze(1)
        if drop is None and self.training and self.class_dropout > 0:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.class_dropout
        null = labels == self.null_label
        return torch.where(null if drop is None else null | drop, self.null_word, self.codebook_size + labels).unsqueeze(1)

    def _run(self, blocks: nn.ModuleList, x: Tensor, nesting: int, cache: TokenCache | None, first: int, rows: Tensor | None) -> Tensor:
        """Through blocks of which the first is the layer `first` of the cache."""

        def call(i: int, x: Tensor) -> Tensor:
            return blocks[i](x, nesting, cache, first + i, rows)

        return self.run_blocks(call, len(blocks), x, writes_cache=cache is not None)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, dim: int, num_heads: int, hidden_units: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = NestedAttention(dim, num_heads, attention_dropout=dropout, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = NestedMLP(dim, hidden_units, dropout=dropout)

    def forward(self, x: Tensor, nesting: int = 1, cache: TokenCache | None = None, layer: int = 0, rows: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), nesting=nesting, cache=cache, layer=layer, rows=rows)
        return x + self.mlp(self.norm2(x), nesting)


class Head(nn.Module):
    """Decoder outputs compared with the words of the codes, to which no gradient flows from here."""

    def __init__(self, dim: int, word_dim: int, codebook_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, word_dim)
        self.norm = nn.LayerNorm(word_dim, 1e-5)
        self.bias = nn.Parameter(torch.zeros(codebook_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """x [B, M, D] and the word table [K + S + 1, C]: float32 [B, M, K]."""
        return F.linear(self.read(x), self.known_words(words), self.bias).float()

    def read(self, x: Tensor) -> Tensor:
        """What is compared with the words, [B, M, C]."""
        return self.norm(F.gelu(self.fc(x)))

    def known_words(self, words: Tensor) -> Tensor:
        """Those of the codes, [K, C]."""
        return words[: len(self.bias)].detach()


class Projector(nn.Module):
    """Two layers, as in SimCLR (arXiv:2002.05709, section 2.1)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))
