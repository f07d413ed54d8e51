"""Attention on a real card: every back end against the formula, and our kernels where the interpreter cannot vouch for them (bfloat16)."""

import pytest
import torch
import torch.nn.functional as F
from forced_backend import forced
from torch import Tensor, nn

from genvision.kernels.attention import attention, plain_attention
from genvision.layers.norm import RMSNorm
from genvision.layers.transformer import SelfAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def heads(head_dim: int, dtype: torch.dtype, *, length: int = 257, groups: int = 4) -> list[Tensor]:
    """Views of one projection: two rows, four query heads; no block of keys is full at 257."""
    all_heads = torch.randn(2, length, 4 + 2 * groups, head_dim, device="cuda").to(dtype)
    return [x.transpose(1, 2) for x in all_heads.split([4, groups, groups], dim=2)]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 100, 128])
def test_our_kernel_gives_what_the_formula_gives(head_dim, dtype):
    for length, groups in ((257, 4), (1024, 2), (7, 1)):
        q, k, v = heads(head_dim, dtype, length=length, groups=groups)
        with forced("triton"):
            out = attention(q, k, v)
        torch.testing.assert_close(out, plain_attention(q, k, v), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("how", ["all", "causal", "mask"])
@pytest.mark.parametrize("name", ["sdpa", "flash", "efficient", "cudnn", "flex"])
def test_back_ends_of_torch_give_what_the_formula_gives(name, how):
    if name == "flash" and how == "mask":
        pytest.skip("flash attention takes no mask")
    q, k, v = heads(64, torch.bfloat16, length=256)
    visible = torch.rand(2, 1, 256, 256, device="cuda") > 0.4
    visible[..., 0] = True
    options = {"mask": visible} if how == "mask" else {"is_causal": how == "causal"}
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with forced(name):
        out = attention(*inputs, **options)
    expected = plain_attention(*inputs, **options)
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
    found, wanted = (torch.autograd.grad(x.float().square().mean(), inputs) for x in (out, expected))
    for gradient, other in zip(found, wanted, strict=True):
        assert (gradient - other).norm() < 0.03 * other.norm()


def test_head_sizes_that_torch_would_pad_are_taken_by_our_kernel_in_sampling():
    q, k, v = heads(100, torch.bfloat16)
    with forced(None):
        torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v), atol=3e-2, rtol=3e-2)
        q = q.detach().requires_grad_()
        attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("head_dim", "qk_norm"), [(64, RMSNorm), (72, nn.LayerNorm), (64, None)])
def test_a_layer_gives_the_same_output_with_heads_prepared_in_one_pass(head_dim, qk_norm, dtype):
    layer = SelfAttention(4 * head_dim, 4, qkv_bias=True, qk_norm=qk_norm).to("cuda", dtype)
    x = torch.randn(2, 256, 4 * head_dim, device="cuda").to(dtype)
    angles = torch.randn(256, head_dim // 2, device="cuda")
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    with torch.no_grad():
        with forced("sdpa"):
            expected = layer(x, rotary)
        for name in (None, "triton"):
            with forced(name):
                torch.testing.assert_close(layer(x, rotary), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_our_kernels_can_be_captured_in_a_graph():
    layer = SelfAttention(256, 4, qk_norm=RMSNorm).to("cuda", torch.bfloat16)
    x = torch.randn(2, 256, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), forced("triton"):
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(F.normalize(x, dim=-1) * 16)
        graph.replay()
        assert not torch.equal(out, expected)
        torch.testing.assert_close(out, layer(x))
