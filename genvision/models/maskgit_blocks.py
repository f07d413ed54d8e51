"""Parts of MaskGIT's networks: three kinds of blocks, and what stands behind the last one.

Shapes: B rows, Q positions that are read, C width, V entries of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.layers.mlp import gelu_tanh
from genvision.layers.modulation import add_gated, gated_then_modulated, modulate, modulated
from genvision.layers.nested import NestedAttention, NestedMLP, NestedSwiGLU, TokenCache
from genvision.layers.norm import RMSNorm

FeedForward = NestedMLP | NestedSwiGLU


class PostNormBlock(nn.Module):
    """x = norm(x + attention x), then x = norm(x + mlp x), as BERT has it (arXiv:1810.04805)."""

    def __init__(self, dim: int, attn: NestedAttention, mlp: FeedForward, norm_eps: float) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.norm1, self.norm2 = nn.LayerNorm(dim, norm_eps), nn.LayerNorm(dim, norm_eps)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [B, Q, C] and silu of the condition [B, C], where there is one; the others are as in `NestedAttention`."""
        x = self.norm1(x + self.attn(x, nesting=nesting, cache=cache, layer=layer, rows=rows))
        return self.norm2(x + self.mlp(x, nesting))

    def multiply_adds(self, num_queries: int, num_keys: int, nesting: int) -> int:
        """Of one row."""
        return self.attn.multiply_adds(num_queries, num_keys, nesting) + self.mlp.multiply_adds(num_queries, nesting)


class PreNormBlock(PostNormBlock):
    """x + attention(norm x), then x + mlp(norm x)."""

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), nesting=nesting, cache=cache, layer=layer, rows=rows)
        return x + self.mlp(self.norm2(x), nesting)


class ModulatedBlock(nn.Module):
    """Pre-norm with RMSNorm, whose outputs the condition shifts and scales, and gates on both branches, which start at zero."""

    def __init__(self, dim: int, attn: NestedAttention, mlp: FeedForward, norm_eps: float) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.norm1, self.norm2 = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.modulation = nn.Linear(dim, 6 * dim)  # shift, scale and gate of attention, then of the feed-forward block

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        layer: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        """See `PostNormBlock.forward`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        branch = self.attn(modulated(self.norm1, x, shift1, scale1), nesting=nesting, cache=cache, layer=layer, rows=rows)
        x, branch = gated_then_modulated(self.norm2, x, gate1, branch, shift2, scale2)
        return add_gated(x, gate2, self.mlp(branch, nesting))

    def multiply_adds(self, num_queries: int, num_keys: int, nesting: int) -> int:
        """Of one row, its modulation included."""
        branches = self.attn.multiply_adds(num_queries, num_keys, nesting) + self.mlp.multiply_adds(num_queries, nesting)
        return branches + self.modulation.weight.numel()


class ModulatedNorm(nn.Module):
    """RMSNorm with weight and bias, shifted and scaled by the condition; the last layer before the head."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, norm_eps)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return modulate(self.norm(x) + self.bias, shift, scale)


class TiedHead(nn.Module):
    """Logits as products with the embeddings of the vocabulary, plus a bias each.

    Args:
        dim: C.
        vocabulary_size: V.
        norm_eps: where given, hidden states pass a linear layer, GELU (its tanh form) and a LayerNorm first, as in BERT.
    """

    def __init__(self, dim: int, vocabulary_size: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim) if norm_eps is not None else None
        self.norm = nn.LayerNorm(dim, norm_eps) if norm_eps is not None else None
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, x: Tensor, table: Tensor, count: int) -> Tensor:
        """x [B, Q, C] and embeddings of the vocabulary [V, C]; logits of its first `count` entries, [B, Q, count]."""
        return F.linear(self.read(x), table[:count], self.bias[:count])

    def read(self, x: Tensor) -> Tensor:
        """What is compared with the embeddings, [B, Q, C]."""
        if self.dense is None or self.norm is None:
            return x
        return self.norm(gelu_tanh(self.dense(x)))
