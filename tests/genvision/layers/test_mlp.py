import pytest
import torch
import torch.nn.functional as F

from genvision.layers.mlp import MLP, TILE, gelu_tanh


@pytest.mark.parametrize("count", [1, 1000, TILE + 1])
def test_gelu_without_gradients_is_the_usual_one(count):
    x = torch.linspace(-12, 12, count)
    with torch.no_grad():
        torch.testing.assert_close(gelu_tanh(x.clone()), F.gelu(x.double(), approximate="tanh").float(), atol=1e-6, rtol=1e-5)


def test_gelu_with_gradients_leaves_its_input():
    x = torch.randn(10, requires_grad=True)
    before = x.detach().clone()
    gelu_tanh(x).sum().backward()
    assert torch.equal(x, before) and x.grad is not None


def test_an_mlp_leaves_its_input():
    mlp, x = MLP(8, 32), torch.randn(2, 5, 8)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")), atol=1e-6, rtol=0)
    assert torch.equal(x, before)
