"""Modulated norms: the formulas, and the fused kernel, interpreted, against them."""

import pytest
import torch
from forced_backend import forced
from torch import nn

from genvision.kernels.modulate import add_gated_norm_modulate, norm_modulate
from genvision.layers.modulation import gated_then_modulated, modulated
from genvision.layers.norm import RMSNorm
from genvision.models.dit import DiT

WIDTH = 40  # no power of two


def tokens(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two rows of three tokens; what modulates them are views of one tensor, as networks make it."""
    shift, scale, gate = torch.randn(2, 3 * WIDTH).to(dtype).chunk(3, dim=1)
    x, branch = torch.randn(2, 2, 3, WIDTH).to(dtype)
    return {"x": x, "branch": branch, "shift": shift, "scale": scale, "gate": gate, "weight": torch.randn(WIDTH).to(dtype)}


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH, 1e-6, elementwise_affine=False), RMSNorm(WIDTH, 1e-5), nn.LayerNorm(WIDTH), nn.Identity()]
)
def test_the_formula_is_the_norm_then_the_modulation(norm):
    t = tokens()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        y = t["x"] + t["gate"][:, None] * t["branch"]
        expected = norm(y) * (1 + t["scale"][:, None]) + t["shift"][:, None]
        for name in (None, "triton"):  # the last two norms are unknown to the kernel, and run by themselves
            with forced(name):
                found = gated_then_modulated(norm, t["x"], t["gate"], t["branch"], t["shift"], t["scale"])
                torch.testing.assert_close(found, (y, expected), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(modulated(norm, y, t["shift"], t["scale"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("with_shift", [True, False])
def test_the_fused_kernel_gives_what_the_formula_gives(kind, with_shift, dtype, tolerance):
    t = tokens(dtype)
    shift = t["shift"] if with_shift else None
    options = {"kind": kind, "weight": t["weight"] if kind == "rms" else None, "eps": 1e-5}
    x = t["x"].transpose(0, 1).contiguous().transpose(0, 1)  # as a patch embedding leaves it, say
    results = []
    for name in ("sdpa", "triton"):
        with forced(name):
            added, out = add_gated_norm_modulate(x, t["gate"], t["branch"], shift, t["scale"], **options)
            results.append((added, out, norm_modulate(x, shift, t["scale"], **options)))
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)
    assert all(found.dtype == dtype and found.is_contiguous() for found in results[1])


def test_gradients_go_through_the_formula_whatever_is_forced():
    t = tokens()
    weight = t["weight"].requires_grad_()
    with forced("triton"):
        out = norm_modulate(t["x"], t["shift"], t["scale"], kind="rms", weight=weight, eps=1e-5)
    assert torch.autograd.grad(out.sum(), weight)[0].abs().min() > 0


@pytest.mark.parametrize(("norm", "use_qk_norm"), [("rms", True), ("layer", False)])
def test_a_network_of_fused_kernels_gives_the_same_output(norm, use_qk_norm):
    model = DiT(
        input_size=4, patch_size=2, hidden_dim=24, depth=2, num_heads=2, num_classes=3, norm=norm, use_rope=True, use_qk_norm=use_qk_norm
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 500.0]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = model(*inputs)
        with forced("triton"):
            torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-4)
