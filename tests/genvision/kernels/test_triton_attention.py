"""Our attention kernels, interpreted, against torch's operations."""

import pytest
import torch
import torch.nn.functional as F
from forced_backend import forced
from torch import Tensor, nn

from genvision.kernels.attention import plain_attention
from genvision.kernels.triton_attention import attention_blocks, fused_attention, padded_size, prepare_heads
from genvision.layers.norm import RMSNorm
from genvision.layers.rotary import rotate_rows
from genvision.layers.transformer import SelfAttention

TOLERANCES = [(torch.float32, 4e-6), (torch.float16, 4e-3)]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 100, 128])
def test_attention_reads_heads_where_the_projection_wrote_them(head_dim, dtype, tolerance):
    q, k, v = torch.randn(1, 33, 6, head_dim).to(dtype).chunk(3, dim=2)  # two heads; no block is full
    out = fused_attention(q, k, v)
    assert out.is_contiguous() and out.dtype == dtype
    torch.testing.assert_close(out, formula(q, k, v), atol=tolerance, rtol=tolerance)


def test_attention_takes_any_strides_grouped_keys_and_other_lengths():
    q = torch.randn(2, 4, 5, 12).transpose(1, 2)  # heads before tokens in memory
    k = torch.randn(2, 36, 2, 12)
    v = torch.randn(2, 36, 12, 2).transpose(2, 3)  # even channels
    torch.testing.assert_close(fused_attention(q, k, v), formula(q, k, v), atol=4e-6, rtol=4e-6)


def test_attention_holds_its_running_sum_where_scores_are_large():
    q, k, v = 30 * torch.randn(3, 1, 48, 1, 16)
    torch.testing.assert_close(fused_attention(q, k, v), formula(q, k, v), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("kind", "tables"), [(None, "one"), ("rms", "none"), ("rms", "one"), ("layer", "none"), ("layer", "of every head")]
)
def test_heads_are_normalised_and_turned_as_layers_do_it(kind, tables, dtype, tolerance):
    heads = torch.randn(2, 5, 3 * 2, 36).to(dtype)[:, :, :4]
    shape = (2, 5, 18, 2) if tables == "of every head" else (5, 18, 2)
    rotary = torch.randn(shape) if tables != "none" else None
    weights = {name: torch.randn(36).to(dtype) for name in ("q_weight", "k_weight", "q_bias", "k_bias")}
    weights = {name: x if kind == "layer" or (kind == "rms" and "weight" in name) else None for name, x in weights.items()}
    expected = heads.float()
    if kind is not None:
        normed = F.layer_norm(expected, (36,), eps=1e-5) if kind == "layer" else F.rms_norm(expected, (36,), eps=1e-5)
        weight, bias = (
            torch.stack([weights[f"{x}_{what}"] for x in "qk"]) if weights[f"q_{what}"] is not None else None for what in ("weight", "bias")
        )
        expected = normed.unflatten(2, (2, 2)) * weight[:, None] + (bias[:, None] if bias is not None else 0)
        expected = expected.flatten(2, 3)
    if rotary is not None:
        expected = rotate_rows(expected, rotary.repeat(2, 1, 1, 1) if tables == "of every head" else rotary)
    found = prepare_heads(heads, rotary, kind=kind, eps=1e-5, **weights)
    torch.testing.assert_close(found, expected.to(dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("qk_norm", [None, RMSNorm, nn.LayerNorm])
def test_a_layer_gives_the_same_output_with_our_kernels(qk_norm):
    layer = SelfAttention(48, 4, qkv_bias=True, qk_norm=qk_norm)
    x, rotary = torch.randn(2, 9, 48), torch.randn(4, 9, 6, 2)
    with torch.no_grad():
        expected = layer(x, rotary)
        with forced("triton"):
            torch.testing.assert_close(layer(x, rotary), expected, atol=1e-6, rtol=1e-5)


def test_blocks_follow_the_shape():
    assert attention_blocks(64, 256, 2, 90).queries == 64 and attention_blocks(64, 1024, 2, 90).queries == 128
    assert attention_blocks(72, 1024, 4, 90).keys < attention_blocks(72, 1024, 2, 90).keys
    assert [padded_size(size) for size in (8, 64, 72, 96, 100, 128)] == [16, 64, 128, 128, 128, 128]
