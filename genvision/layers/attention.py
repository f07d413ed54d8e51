"""Multi-head causal attention over `kernels.attention`, with rotary positions, grouped keys and a static cache.

Shapes: B rows, N new positions, M positions in the cache, H query heads, G key heads, D head size.
"""

from collections.abc import Callable
from copy import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from genvision.kernels.attention import attention
from genvision.kernels.decode import DecodeStep
from genvision.layers.rotary import rotate

Cache = TypeVar("Cache", bound="KVCache")


class KVCache:
    """Keys and values of every layer, allocated once at the exact length of the sequence.

    Args:
        depth: number of layers.
        rows: B.
        num_heads: G.
        length: positions that will ever be stored.
        head_dim: D.
    """

    def __init__(
        self, depth: int, rows: int, num_heads: int, length: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.store = torch.empty(depth, rows, 2, num_heads, length, head_dim, dtype=dtype, device=device)  # keys, then values
        self.filled = 0
        self.place: Tensor | None = None  # `filled` on the device, where a captured step reads it: int32 [1]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, G, N, D] behind what is there; returns all keys and values so far, [B, G, M + N, D]."""
        end = self.filled + keys.shape[2]
        of_layer = self.store[layer]
        of_layer[:, 0, :, self.filled : end] = keys
        of_layer[:, 1, :, self.filled : end] = values
        return of_layer[:, 0, :, :end], of_layer[:, 1, :, :end]

    def next_position(self, rotary: Tensor | None) -> DecodeStep:
        """What reads and writes one more position in every layer; rotary is the whole table."""
        return DecodeStep(self.store, self.filled if self.place is None else self.place, rotary)

    def first_rows(self: Cache, rows: int) -> Cache:
        """The same memory, seen through its first rows."""
        part = copy(self)
        part.place, part.store = None, self.store[:, :rows]
        return part

    def joined(self: Cache, other: Cache) -> Cache:
        """A new cache with the rows of both; both must be filled equally far."""
        assert self.filled == other.filled
        both = copy(self)
        both.place, both.store = None, torch.cat([self.store, other.store], 1)
        return both


class Attention(nn.Module):
    """Causal self-attention; one fused projection ordered [queries | keys | values].

    Args:
        dim: C.
        num_heads: H.
        num_kv_heads: G.
        bias: of both projections.
        qk_norm: makes the norm over D of queries, and that of keys; None leaves them.
        attention_dropout: on attention weights.
        dropout: behind the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm is not None else None
        self.k_norm = qk_norm(self.head_dim) if qk_norm is not None else None
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """x [B, N, C], at the positions of rotary [N, D / 2, 2] if there is one; causal unless a mask [B, 1, N, M + N] is given."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2G, N, D]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attention(
            q, k, v, mask=mask, is_causal=mask is None and q.shape[2] > 1, dropout=self.attention_dropout if self.training else 0.0
        )  # [B, H, N, D]
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))

    def step(self, x: Tensor, decode: DecodeStep, layer: int) -> Tensor:
        """One new position of each row, x [B, C], behind what the cache holds, without gradients; see `KVCache.next_position`."""
        heads = self.qkv(x)  # [B, (H + 2G) D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = heads.unflatten(-1, (-1, self.head_dim)).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
            heads = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=1).flatten(1)
        return self.proj(decode(layer, heads))
