"""The one attention call: every back end against the formula, and which of them is chosen."""

import multiprocessing

import pytest
import torch
import torch.nn.functional as F
from forced_backend import forced

from genvision.errors import UserError
from genvision.kernels.attention import attention, choose_backend, plain_attention

HALF = torch.bfloat16


def heads(groups: int = 4, dtype: torch.dtype = torch.float32, head_dim: int = 12) -> tuple[torch.Tensor, ...]:
    """Two rows, four query heads, 20 positions."""
    return tuple(torch.randn(2, count, 20, head_dim).to(dtype) for count in (4, groups, groups))


def mask() -> torch.Tensor:
    visible = torch.rand(2, 1, 20, 20) > 0.4
    visible[..., 0] = True
    return visible


def test_the_formula_is_that_of_a_loop_over_heads():
    q, k, v = heads(groups=2)
    visible = mask()
    out = plain_attention(q, k, v, mask=visible)
    for row in range(2):
        for head in range(4):
            scores = (q[row, head] @ k[row, head // 2].T / 12**0.5).masked_fill(~visible[row, 0], -1e9)
            torch.testing.assert_close(out[row, head], scores.exp() / scores.exp().sum(1, keepdim=True) @ v[row, head // 2])


@pytest.mark.parametrize(
    ("name", "how", "groups"),
    [
        ("sdpa", "all", 4), ("sdpa", "causal", 2), ("sdpa", "mask", 2), ("flash", "all", 2), ("flash", "causal", 4),
        ("flex", "causal", 4), ("flex", "mask", 2), ("triton", "all", 4), ("triton", "all", 2),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_back_ends_give_what_the_formula_gives(name, how, groups):
    # in a process of its own: after one call of FlexAttention, forks of a process can no longer train, and later tests start such forks
    process = multiprocessing.get_context("fork").Process(target=agrees_with_the_formula, args=(name, how, groups))
    process.start()
    process.join()
    assert process.exitcode == 0


def agrees_with_the_formula(name, how, groups):
    options = {"mask": mask()} if how == "mask" else {"is_causal": how == "causal"}
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        q, k, v = heads(groups, dtype)
        with forced(name):
            out = attention(q, k, v, **options)
        assert out.dtype == dtype
        torch.testing.assert_close(out, plain_attention(q, k, v, **options), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "how"), [("sdpa", "causal"), ("sdpa", "mask"), ("flash", "causal"), ("plain", "mask")])
def test_gradients_are_those_of_the_formula(name, how):
    options = {"mask": mask()} if how == "mask" else {"is_causal": True}
    inputs = [x.requires_grad_() for x in heads(groups=2)]
    with forced(name):
        found = torch.autograd.grad(attention(*inputs, **options).square().sum(), inputs)
    expected = torch.autograd.grad(plain_attention(*inputs, **options).square().sum(), inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [None, "plain", "sdpa"])
def test_dropout_scales_what_it_keeps(name):
    q, k = torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 50, 8)
    with forced(name):
        torch.testing.assert_close(attention(q, k, torch.ones_like(k), dropout=0.0), torch.ones_like(q))
        out = attention(q, k, torch.ones_like(k), dropout=0.5)  # of 50 equal weights half are dropped, the others doubled
    assert abs(out.mean() - 1) < 0.02 and out.std() > 0.1


def test_a_cpu_calls_torch_unless_another_is_forced():
    q, k, v = heads(groups=2)
    with forced(None):
        assert torch.equal(attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


DEFAULT = dict(
    query=(2, 4, 256, 64), key=(2, 4, 256, 64), dtype=HALF, device="cuda", masked=False, is_causal=False, dropout=0.0,
    needs_grad=False, triton=True, forced=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sdpa"),
        ({"query": (2, 4, 256, 72)}, "sdpa"),
        ({"query": (2, 4, 256, 100)}, "triton"),
        ({"query": (2, 4, 256, 100), "triton": False}, "sdpa"),
        ({"query": (2, 4, 256, 100), "device": "cpu"}, "sdpa"),
        ({"query": (2, 4, 256, 100), "needs_grad": True}, "sdpa"),
        ({"query": (2, 4, 256, 100), "masked": True}, "sdpa"),
        ({"query": (2, 4, 256, 100), "is_causal": True}, "sdpa"),
        ({"query": (2, 4, 256, 100), "dtype": torch.float32}, "sdpa"),
        ({"query": (2, 4, 1, 100)}, "sdpa"),
        ({"forced": "plain", "masked": True, "dropout": 0.1}, "plain"),
        ({"forced": "flash", "dropout": 0.1, "needs_grad": True}, "flash"),
        ({"forced": "flash", "device": "cpu", "dtype": torch.float32}, "flash"),
        ({"forced": "efficient", "masked": True}, "efficient"),
        ({"forced": "cudnn"}, "cudnn"),
        ({"forced": "flex", "masked": True, "needs_grad": True}, "flex"),
        ({"forced": "triton", "query": (2, 4, 1, 128), "dtype": torch.float32}, "triton"),
    ],
)
def test_the_choice(changes, expected):
    assert choose_backend(**DEFAULT | changes) == expected


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"forced": "flash", "masked": True}, "a mask"),
        ({"forced": "flash", "dtype": torch.float32}, "float32 on CUDA"),
        ({"forced": "flash", "device": "cpu", "dropout": 0.1}, "dropout on device cpu"),
        ({"forced": "efficient", "device": "cpu"}, "device cpu"),
        ({"forced": "efficient", "key": (2, 2, 256, 64)}, "grouped queries"),
        ({"forced": "cudnn", "query": (2, 4, 256, 100)}, "head size 100"),
        ({"forced": "flex", "dropout": 0.1}, "dropout"),
        ({"forced": "flex", "device": "cpu", "needs_grad": True}, "gradients on device cpu"),
        ({"forced": "triton", "needs_grad": True}, "gradients"),
        ({"forced": "triton", "is_causal": True}, "causal attention"),
        ({"forced": "triton", "device": "cpu", "triton": False}, "device cpu here"),
    ],
)
def test_a_forced_back_end_that_cannot_do_a_call_says_so_in_one_line(changes, obstacle):
    with pytest.raises(UserError, match=f"GENVISION_ATTENTION={changes['forced']} cannot do {obstacle}") as raised:
        choose_backend(**DEFAULT | changes)
    assert str(raised.value).endswith("; unset it or set it to sdpa") and "\n" not in str(raised.value)


def test_what_is_forced_reaches_the_choice():
    q, k, v = (x.requires_grad_() for x in heads())
    with forced("triton"), pytest.raises(UserError, match="GENVISION_ATTENTION=triton cannot do gradients"):
        attention(q, k, v)
    with forced("flash"), pytest.raises(UserError, match="cannot do a mask"):
        attention(q, k, v, mask=mask())
    with forced("triton"), torch.no_grad(), torch.autocast("cpu"), pytest.raises(UserError, match="it needs CUDA"):
        attention(q, k, v)
