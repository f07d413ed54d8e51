"""The one attention call for one new token against a cache of keys and values; it chooses the back end.

Shapes: B rows (guided and unguided ones alike), H query heads, G key heads, D head size, M positions that the cache can hold.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.kernels.backends import fuses

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DecodeStep:
    """`decode_attention` of all layers of a network for one token; what the layers share is made once.

    Args:
        store: [depth, B, 2, G, M, D], keys and values of every layer.
        position, rotary: see `decode_attention`.
    """

    def __init__(self, store: Tensor, position: int | Tensor, rotary: Tensor | None = None) -> None:
        self.store, self.position, self.rotary = store, position, rotary
        self.rows, self.groups, self.head_dim = store.shape[1], store.shape[3], store.shape[5]
        is_lean = isinstance(position, int) and store.device.type == "cpu" and store.dtype == torch.float32 and not fuses(store)
        self.slots: Sequence[Tensor] | None = None
        if is_lean:
            self.slots = store[..., position, :].unbind(0)  # [B, 2, G, D] of each layer
            self.keys = store[:, :, 0, :, : position + 1].unbind(0)
            self.values = store[:, :, 1, :, : position + 1].unbind(0)
            self.turns: Tensor | None = None

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """Of a layer's heads [B, (H + 2G) D], queries | keys | values: [B, H D]."""
        if self.slots is None or heads.dtype != torch.float32:  # autocast
            heads = heads.unflatten(-1, (-1, self.head_dim))
            keys, values = self.store[layer].unbind(1)
            return decode_attention(heads, keys, values, self.position, rotary=self.rotary).flatten(1)
        return self._lean(layer, heads, self.slots[layer])

    def _lean(self, layer: int, heads: Tensor, slot: Tensor) -> Tensor:
        """The plain form with few operations: on a CPU each takes some microseconds, in every layer."""
        heads = heads.view(self.rows, -1, self.head_dim)
        num_heads = heads.shape[1] - 2 * self.groups
        if self.rotary is not None:
            if self.turns is None:
                assert isinstance(self.position, int)
                turn = torch.view_as_complex(self.rotary[self.position])
                # values are turned by 1, so that one copy stores them with the keys
                self.turns = torch.cat([turn.expand(num_heads + self.groups, -1), torch.ones_like(turn).expand(self.groups, -1)])
            heads = (heads.view(torch.complex64) * self.turns).view(torch.float32)
        slot.copy_(heads[:, num_heads:].view(self.rows, 2, self.groups, self.head_dim))
        # the query heads of a key head as its queries: no key is read twice, and SDPA need not know of groups
        queries = heads[:, :num_heads].view(self.rows, self.groups, -1, self.head_dim)
        return F.scaled_dot_product_attention(queries, self.keys[layer], self.values[layer]).reshape(self.rows, -1)


def decode_attention(
    heads: Tensor, keys: Tensor, values: Tensor, position: int | Tensor, *, rotary: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Turn the new token's query and key, store its key and value in the cache, and attend to all that is there.

    The query and key are turned in float32 and the softmax is taken in float32. Of the cache, nothing but `position` is written, and
    nothing behind it is read.

    Args:
        heads: [B, H + 2G, D], queries | keys | values as the fused projection makes them, of the cache's dtype. Query head h reads key
            head h // (H / G).
        keys: [B, G, M, D], of one layer; a view is fine as long as channels lie side by side.
        values: like keys, with the same strides.
        position: how many positions are filled, which is the new token's place. As a tensor of one int32 or int64 on the device it is
            read there if the back end is `triton`, so that a CUDA graph of the call serves every position; the other back end waits for it.
        rotary: float32 [M or more, D / 2, 2], cosines and sines of every position as in `genvision.layers.rotary`; None turns nothing.
        first: int32 or int64 [B], the first position that a row sees (text is padded on the left); at most `position`. None means 0.

    Returns:
        [B, H, D], in the dtype of heads.
    """
    if decode_backend(heads, keys) == "triton":
        from genvision.kernels.triton_decode import decode_attention_triton

        return decode_attention_triton(heads, keys, values, position, rotary=rotary, first=first)
    return plain_decode_attention(heads, keys, values, int(position), rotary=rotary, first=first)


def decode_backend(heads: Tensor, keys: Tensor) -> Literal["sdpa", "triton"]:
    """What computes a call with these tensors.

    GENVISION_ATTENTION=triton takes the kernel wherever it runs, every other name takes torch's attention: for one query, no other back
    end does anything that SDPA does not choose by itself.
    """
    return "triton" if heads.dtype in FUSED_DTYPES and fuses(heads, keys) else "sdpa"


def plain_decode_attention(
    heads: Tensor, keys: Tensor, values: Tensor, position: int, *, rotary: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """`decode_attention` in torch, with few operations: on a CPU each costs some microseconds, in every layer and for every token."""
    rows, groups, _, head_dim = keys.shape
    num_heads = heads.shape[1] - 2 * groups
    turned = heads
    if rotary is not None:
        # one complex product; to turn the values, too, takes less time than to cut them off
        pairs = heads.float().view(torch.complex64) * torch.view_as_complex(rotary[position])
        turned = pairs.view(torch.float32).type_as(heads)
    keys[:, :, position] = turned[:, num_heads : num_heads + groups]
    values[:, :, position] = heads[:, num_heads + groups :]
    end = position + 1
    mask = None
    if first is not None:
        mask = (torch.arange(end, device=first.device) >= first.unsqueeze(1))[:, None, None]  # [B, 1, 1, M]
    # the query heads of a key head as its queries: no key is read twice, and SDPA need not know of groups
    queries = turned[:, :num_heads].view(rows, groups, -1, head_dim)  # [B, G, H / G, D]
    out = F.scaled_dot_product_attention(queries, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
    return out.reshape(rows, num_heads, head_dim)
