"""Modulated norms on a real card: the fused kernel against the formulas, and a whole network with it."""

import pytest
import torch
from forced_backend import forced
from torch import nn

from genvision.kernels.modulate import add_gated_norm_modulate, norm_modulate
from genvision.models.dit import DiT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [384, 1152, 2048, 100])
def test_the_fused_kernel_gives_what_the_formula_gives(width, kind, dtype):
    shift, scale, gate = torch.randn(3, 3 * width, device="cuda").to(dtype).chunk(3, dim=1)
    x, branch = torch.randn(2, 3, 64, width, device="cuda").to(dtype)
    weight = torch.randn(width, device="cuda").to(dtype) if kind == "rms" else None
    results = []
    for name in ("sdpa", None):
        with forced(name), torch.no_grad():
            added, out = add_gated_norm_modulate(x, gate, branch, shift, scale, kind=kind, weight=weight, eps=1e-6)
            results.append((added, out, norm_modulate(x, None, scale, kind=kind, weight=weight, eps=1e-6)))
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_network_gives_the_same_output_with_our_kernels(norm):
    model = DiT(hidden_dim=384, depth=4, num_heads=6, norm=norm, use_rope=True, use_qk_norm=True).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model = model.to("cuda")
    inputs = torch.randn(2, 4, 32, 32, device="cuda"), torch.tensor([3.0, 500.0], device="cuda"), torch.tensor([0, 7], device="cuda")
    with torch.no_grad():
        with forced("sdpa"):
            expected = model(*inputs)
        for name in (None, "triton"):
            with forced(name):
                torch.testing.assert_close(model(*inputs), expected, atol=1e-3, rtol=1e-3)
