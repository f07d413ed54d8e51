"""One new token for a few rows, a cache that is partly filled, and what must come out, computed in float64 by the book."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing import assert_close

from genvision.kernels.decode import decode_attention

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative and absolute; in half precision four times the rounding of a number near 1, since torch rounds turned queries, too."""


@dataclass
class Example:
    """Tensors of one call of `decode_attention`. The cache is a slice of a larger one: layer 1 of 2, all rows but the last."""

    heads: Tensor
    cache: Tensor  # [2, 2, B + 1, G, M, D]: keys and values, layers
    position: int
    rotary: Tensor | None
    first: Tensor | None

    @property
    def keys(self) -> Tensor:
        return self.cache[0, 1, :-1]

    @property
    def values(self) -> Tensor:
        return self.cache[1, 1, :-1]

    def run(self, position: int | Tensor | None = None) -> Tensor:
        position = self.position if position is None else position
        return decode_attention(self.heads, self.keys, self.values, position, rotary=self.rotary, first=self.first)

    def check(self, out: Tensor, expected: Tensor, cache: Tensor) -> None:
        """The output, the new key and value, and every other number of the cache, bit for bit."""
        tolerance = TOLERANCES[out.dtype]
        assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        new_key = cache[0, 1, :-1, :, self.position]
        assert_close(self.keys[:, :, self.position], new_key, rtol=tolerance, atol=tolerance)
        new_key.copy_(self.keys[:, :, self.position])
        assert_close(self.cache, cache, rtol=0, atol=0, equal_nan=True)

    @property
    def num_heads(self) -> int:
        return self.heads.shape[1] - 2 * self.keys.shape[1]

    def turned(self, x: Tensor) -> Tensor:
        """x [B, H, D] in float64, its pairs turned by the table's row."""
        x = x.double()
        if self.rotary is None:
            return x
        cos, sin = self.rotary[self.position].double().unbind(-1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(2)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Output [B, H, D] in float64, and the whole cache behind the call, rounded once."""
        num_heads, groups = self.num_heads, self.keys.shape[1]
        q = self.turned(self.heads[:, :num_heads])
        cache = self.cache.clone()
        cache[0, 1, :-1, :, self.position] = self.turned(self.heads[:, num_heads:-groups]).to(cache.dtype)
        cache[1, 1, :-1, :, self.position] = self.heads[:, -groups:]
        k, v = cache[:, 1, :-1, :, : self.position + 1].double().repeat_interleave(num_heads // groups, dim=2)  # each [B, H, M, D]
        scores = (k @ q.unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5  # [B, H, M]
        if self.first is not None:
            hidden = torch.arange(self.position + 1, device=k.device) < self.first[:, None]
            scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
        return (scores.softmax(-1).unsqueeze(2) @ v).squeeze(2), cache


def make_example(
    rows: int,
    num_heads: int,
    groups: int,
    head_dim: int,
    position: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rotary: bool = True,
    padded: bool = False,
) -> Example:
    """What lies behind the position is no number. The table's first row is zero, as LlamaGen's. With padding, row b sees nothing of its
    first b positions."""
    angles = torch.arange(length).unsqueeze(1) * torch.linspace(1, 0.01, head_dim // 2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    table[0] = 0
    cache = torch.randn(2, 2, rows + 1, groups, length, head_dim).to(device, dtype)
    cache[:, 1, :-1, :, position:] = torch.nan
    return Example(
        torch.randn(rows, num_heads + 2 * groups, head_dim).to(device, dtype),
        cache,
        position,
        table.to(device) if rotary else None,
        torch.arange(rows, dtype=torch.int32, device=device).clamp(max=position) if padded else None,
    )
