import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from genvision.training.ema import EMA


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_average_equals_the_formula_and_buffers_are_copied():
    model = network()
    start = model[0].weight.detach().clone()
    ema = EMA(model, (0.9, 0.5))
    model(torch.randn(8, 3))  # moves the running statistics of the batch norm
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(100)
    torch.testing.assert_close(ema.averages[0.9]["0.weight"], start + 0.1)
    torch.testing.assert_close(ema.averages[0.5]["0.weight"], start + 0.5)
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(ema.averages[0.9][name], model.state_dict()[name])


@pytest.mark.parametrize("num_steps", [5, 100])
def test_equals_the_average_of_diffusers(num_steps):
    model = network()
    ours, theirs = EMA(model, (0.9,)), EMAModel(model.parameters(), decay=0.9)
    theirs.step(model.parameters())  # its first step only copies
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        theirs.step(model.parameters())
    for (name, _), shadow in zip(model.named_parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours.averages[0.9][name], shadow)


def test_a_short_run_does_not_keep_its_random_start():
    model = network()
    ema = EMA(model, (0.9999,))
    with torch.no_grad():
        model[0].weight.add_(1000)
    for step in range(1, 31):
        ema.update(step)
    torch.testing.assert_close(ema.averages[0.9999]["0.weight"], model[0].weight, rtol=1e-4, atol=0.1)


def test_weights_come_back_bit_for_bit_after_use():
    model = network()
    ema = EMA(model, (0.5,))
    with torch.no_grad():
        model[0].weight.mul_(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.applied():
        assert not torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_decays_nothing_is_kept():
    model = network()
    ema = EMA(model, ())
    ema.update(1)
    with ema.applied():
        assert ema.averages == {}
