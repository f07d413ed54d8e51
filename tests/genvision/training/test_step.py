"""One step with a gradient scaler, as fp16 has it: here on a CPU, with float32 passes."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from genvision.training.config import OptimConfig
from genvision.training.step import Stepper
from genvision.training.trainee import Trainee

OPTIM = OptimConfig(lr=0.1, weight_decay=0.0, max_grad_norm=1.0, eps=1.0)  # with a small eps Adam would not see a factor


class Pair:
    """A model and an adversary, each a linear map with a loss of its own."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.network, self.statistics, self.factor = nn.Linear(2, 1), nn.Linear(2, 1), (), 1.0
        self.adversary = Adversary(self.network)

    def loss(self, model, batch):
        return {"loss": self.factor * model(batch["x"]).square().mean()}


class Adversary:
    def __init__(self, network):
        self.network, self.statistics, self.factor = network, (), 1.0

    def loss(self, batch):
        return {"adversary_loss": self.factor * self.network(batch["x"]).square().mean()}


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    yield accelerator
    AcceleratorState._reset_state(True)


def stepper(accelerator, pair, factor=None):
    trainees = [
        Trainee(pair.model, OPTIM, 10, accelerator, names=("model", "optimizer")),
        Trainee(pair.network, OPTIM, 10, accelerator, names=("adversary", "adversary_optimizer"), wrap=False),
    ]
    return Stepper(accelerator, pair, trainees, 1, factor)


def one_step(steps, stop=False):
    gradients = steps.passes({"x": torch.tensor([[1.0, 2.0], [3.0, -1.0]])})
    verdict = steps.agree(gradients, stop=stop, data_failed=False)
    steps.update(gradients, verdict)
    return verdict


def weights(pair):
    return [parameter.detach().clone() for network in (pair.model, pair.network) for parameter in network.parameters()]


def with_scaler(accelerator):
    accelerator.state._mixed_precision = "fp16"  # which Accelerate refuses on a CPU
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=256.0), True
    accelerator.autocast = nullcontext
    return accelerator


def test_both_networks_make_the_step_that_they_make_without_a_scaler(accelerator):
    plain = Pair()
    one_step(stepper(accelerator, plain))
    scaled = Pair()
    assert one_step(stepper(with_scaler(accelerator), scaled)).is_good
    for one, other in zip(weights(plain), weights(scaled), strict=True):
        torch.testing.assert_close(one, other)


def test_an_overflow_makes_the_scale_smaller_changes_no_weight_and_is_no_fault(accelerator):
    pair = Pair()
    steps = stepper(with_scaler(accelerator), pair)
    before = weights(pair)
    pair.adversary.factor = 1e37  # finite itself, not 256 times
    verdict = one_step(steps)
    assert not verdict.is_good and verdict.is_overflow
    assert all(torch.equal(*both) for both in zip(before, weights(pair), strict=True))
    assert accelerator.scaler.get_scale() < 256


def test_gradients_that_stay_infinite_become_a_fault(accelerator):
    pair = Pair()
    steps = stepper(with_scaler(accelerator), pair)
    pair.adversary.factor = 1e37
    weight = next(iter(pair.network.parameters()))
    weight.register_hook(lambda gradient: gradient * float("inf"))
    verdicts = [one_step(steps).is_overflow for _ in range(12)]
    assert verdicts[0] and not verdicts[-1]


def test_a_loss_that_is_not_finite_is_a_fault_with_a_scaler_too(accelerator):
    pair = Pair()
    steps = stepper(with_scaler(accelerator), pair)
    before = weights(pair)
    pair.factor = float("nan")
    verdict = one_step(steps)
    assert not verdict.is_good and not verdict.is_overflow
    assert all(torch.equal(*both) for both in zip(before, weights(pair), strict=True))


def test_an_exploded_loss_changes_no_weight_with_a_scaler_either(accelerator):
    pair = Pair()
    steps = stepper(with_scaler(accelerator), pair, factor=3.0)
    steps.mean_loss, steps.num_good = 1e-6, 1000
    before = weights(pair)
    assert not one_step(steps).is_good
    assert all(torch.equal(*both) for both in zip(before, weights(pair), strict=True))
