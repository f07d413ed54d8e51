"""Bidirectional pre-norm transformer with gated MLPs, as ViTok has it (arXiv:2501.09755, section 2.1).

Shapes: B rows, N tokens, C width, H heads, D head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genvision.kernels.attention import attention
from genvision.kernels.backends import fuses, needs_gradient
from genvision.layers.checkpointing import Trunk
from genvision.layers.mlp import GEGLU
from genvision.layers.norm import norm_options
from genvision.layers.rotary import rotate_rows


class SelfAttention(nn.Module):
    """Every token sees every token; one projection ordered [queries | keys | values], an output projection with bias.

    Args:
        dim: C.
        num_heads: H.
        qkv_bias: of the first projection.
        qk_norm: makes the norm over D of queries, and that of keys; None leaves them.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False, qk_norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm is not None else None
        self.k_norm = qk_norm(self.head_dim) if qk_norm is not None else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """x [B, N, C]; rotary as `rotate_rows` takes it."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, N, 3H, D]
        q_and_k, v = heads.split([2 * self.num_heads, self.num_heads], dim=2)
        if self.q_norm is not None or rotary is not None:
            q_and_k = self._prepared(q_and_k, rotary)
        q, k = q_and_k.chunk(2, dim=2)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, N, D]
        return self.proj(out.transpose(1, 2).flatten(2))

    def _prepared(self, q_and_k: Tensor, rotary: Tensor | None) -> Tensor:
        """Normalised and turned, [B, N, 2H, D]; in one pass where a kernel of ours does it."""
        if fuses(q_and_k, rotary):
            q_norm, k_norm = norm_options(self.q_norm), norm_options(self.k_norm)
            if q_norm and k_norm and not needs_gradient(q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias):
                from genvision.kernels.triton_attention import prepare_heads

                weights = {"q_weight": q_norm.weight, "q_bias": q_norm.bias, "k_weight": k_norm.weight, "k_bias": k_norm.bias}
                return prepare_heads(q_and_k, rotary, kind=q_norm.kind, eps=q_norm.eps, **weights)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = q_and_k.chunk(2, dim=2)
            q_and_k = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        if rotary is not None:
            if rotary.dim() == 4:  # a head's query and key turn alike
                rotary = rotary.repeat(2, 1, 1, 1)
            q_and_k = rotate_rows(q_and_k, rotary)
        return q_and_k


class TransformerBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GEGLU(dim, hidden_dim)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class Transformer(Trunk, nn.Module):
    """Blocks and a final LayerNorm."""

    def __init__(self, dim: int, depth: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, hidden_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """x [B, N, C]; rotary [N, D / 2, 2] for all blocks and heads alike, or [depth, H, N, D / 2, 2]."""

        def call(i: int, x: Tensor) -> Tensor:
            return self.blocks[i](x, rotary[i] if rotary is not None and rotary.dim() == 5 else rotary)

        return self.norm(self.run_blocks(call, len(self.blocks), x))
