"""The kernel that draws tokens, on a real card, against the forms for CPUs."""

import math

import pytest
import torch

from genvision.kernels.draw import draw_plainly, draw_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [257, 1024, 16384, 65536])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 200}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.9, "temperature": 0.7}, {"temperature": 0.0}, {"top_k": 10**6}],
    ids=str,
)
def test_a_card_takes_the_tokens_of_the_cpu(dtype, vocabulary, options):
    logits = (3 * torch.randn(128, vocabulary)).to(dtype)  # in half precision many tie
    noise = torch.rand(64, 3, dtype=torch.float64)
    for scale in (None, 1.75):
        rows = logits if scale is not None else logits[:64]
        tokens = draw_tokens(rows.cuda(), noise.cuda()[:, 1], guidance_scale=scale, **options)
        assert torch.equal(tokens.cpu(), draw_tokens(rows, noise[:, 1], guidance_scale=scale, **options))


def test_the_plain_form_takes_the_same_tokens_on_a_card():
    logits, u = 3 * torch.randn(256, 16384), torch.rand(256, dtype=torch.float64)
    for options in ({"top_k": 2000}, {"top_k": 2000, "top_p": 0.9}, {"top_p": 0.9}):
        tokens = draw_plainly(logits.cuda(), u.cuda(), temperature=0.8, **options)
        assert torch.equal(tokens.cpu(), draw_tokens(logits, u, temperature=0.8, **options))


def test_impossible_tokens_are_never_taken_on_a_card():
    logits = torch.full((2, 5000), -math.inf)
    logits[:, [17, 4100]] = 1.0
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits.cuda(), u.cuda()).tolist() == [17, 4100]
    assert draw_tokens(logits.cuda(), u.cuda(), top_k=7, top_p=0.4).tolist() == [17, 17]


def test_nothing_waits_for_the_card():
    logits, u = torch.randn(32, 16384, device="cuda"), torch.rand(16, dtype=torch.float64, device="cuda")
    draw_tokens(logits, u, guidance_scale=2.0, top_k=100)
    expected = draw_tokens(logits, u, guidance_scale=2.0, top_k=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation would fail here
        tokens = draw_tokens(logits, u, guidance_scale=2.0, top_k=100)
    graph.replay()
    assert torch.equal(tokens, expected)
