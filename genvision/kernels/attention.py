"""The one attention call of the codebase; it chooses the back end."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: [B, H, N, D].
        k: [B, G, M, D]; where G < H, query head h reads key head h // (H / G).
        v: [B, G, M, D].
        mask: boolean, broadcastable to [B, H, N, M]; True where a query may look.
        is_causal: query i sees keys 0..i; needs N = M and no mask.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, N, D].
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
