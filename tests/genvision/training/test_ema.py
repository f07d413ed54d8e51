import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from genvision.models.dit import DiT
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


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_of_a_diffusion_transformer_equals_that_of_diffusers(warmup):
    """EMAModel without its option use_ema_warmup still begins with min(decay, (1 + n) / (10 + n)), as `warmup` does here; min_decay
    holds it at the decay. Its first step is a copy, whatever the options."""
    torch.manual_seed(0)
    model = DiT(input_size=4, in_channels=2, hidden_dim=16, depth=1, num_heads=2, num_classes=3, norm="rms", use_qk_norm=True)
    ours = EMA(model, (0.95,), warmup=warmup)
    theirs = EMAModel(model.parameters(), decay=0.95, min_decay=0.0 if warmup else 0.95, use_ema_warmup=False)
    theirs.step(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(1, 31):
        x, t, labels = torch.randn(4, 2, 4, 4), torch.rand(4) * 999, torch.arange(4) % 3
        (model(x, t, labels) - torch.randn(4, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update(step)
        theirs.step(model.parameters())
        assert theirs.cur_decay_value == ours.decay_at(step, 0.95) == (min(0.95, (1 + step) / (10 + step)) if warmup else 0.95)
    averages = ours.state_dict(0.95)
    for (name, parameter), shadow in zip(model.named_parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(averages[name], shadow)
        assert not torch.equal(averages[name], parameter)
    theirs.copy_to(model.parameters())
    assert all(torch.allclose(tensor, averages[name], atol=1e-6) for name, tensor in model.state_dict().items())


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
