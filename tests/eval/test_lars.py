"""LARS and the probe trained by it."""

import math

import pytest
import torch

from genvision.eval.lars import LARS
from genvision.eval.probe_mage import MageProbe, MageRecipe, cosine_with_warmup


def steps(weight: torch.Tensor, gradients: list[torch.Tensor], **options: float) -> torch.Tensor:
    weight = weight.clone().requires_grad_()
    optimizer = LARS([weight], **options)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def test_a_matrix_moves_by_its_own_length_along_the_gradient_with_momentum():
    # |w| = 5; |g| = 2 and then 0.5
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    first, second = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    moved = steps(weight, [first], lr=0.1, momentum=0.9, trust_coefficient=0.01)
    torch.testing.assert_close(moved, torch.tensor([[3.0, -0.1 * 0.01 * 5], [0.0, 4.0]]))
    again = steps(weight, [first, second], lr=0.1, momentum=0.9, trust_coefficient=0.01)
    length = math.hypot(5.0, 0.005)
    expected = torch.tensor([[3.0, -0.005 - 0.1 * 0.9 * 0.05], [-0.1 * 0.01 * length, 4.0]])
    torch.testing.assert_close(again, expected)


def test_decay_counts_before_the_length_is_taken():
    weight, gradient = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.3]])
    # d = (0.2 * 2, 0.3), |d| = 0.5, so q = 0.01 * 2 / 0.5
    moved = steps(weight, [gradient], lr=1.0, weight_decay=0.2, trust_coefficient=0.01)
    torch.testing.assert_close(moved, torch.tensor([[2.0 - 0.04 * 0.4, -0.04 * 0.3]]))


def test_vectors_get_plain_momentum_and_zeros_are_left_unscaled():
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.7, "trust_coefficient": 0.01}
    vector = steps(torch.tensor([1.0]), [torch.tensor([2.0])] * 2, **options)
    torch.testing.assert_close(vector, torch.tensor([1.0 - 0.2 - 0.1 * (1.0 + 2.0)]))
    torch.testing.assert_close(steps(torch.zeros(1, 2), [torch.ones(1, 2)], **options), torch.full((1, 2), -0.1))
    assert torch.equal(steps(torch.ones(1, 2), [torch.zeros(1, 2)], lr=0.1), torch.ones(1, 2))


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="momentum -1"):
        LARS([torch.zeros(1)], lr=0.1, momentum=-1)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    assert cosine_with_warmup(0.0, 0.2) == 0.0 and cosine_with_warmup(0.1, 0.2) == pytest.approx(0.5)
    assert cosine_with_warmup(0.2, 0.2) == 1.0
    assert cosine_with_warmup(0.6, 0.2) == pytest.approx(0.5) and cosine_with_warmup(1 - 1e-9, 0.2) == pytest.approx(0.0, abs=1e-9)


def separable(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(num) % 3
    return torch.nn.functional.one_hot(labels, 16) * 3 + torch.randn(num, 16), labels


def test_the_probe_of_mage_learns_classes_whatever_the_scale_of_rows_and_channels():
    features, labels = separable(300)
    scales = 10 ** torch.linspace(-2, 2, 300).unsqueeze(1)
    for rows in (features[:200], features[:200] * scales[:200]):
        probe = MageProbe(rows, labels[:200], 3, MageRecipe(epochs=30, batch_size=50, learning_rate=50.0))
        assert (probe(features[200:]) == labels[200:]).float().mean() > 0.9
        assert probe.loss < math.log(3)


def test_the_probe_of_mage_depends_on_its_seed_alone():
    features, labels = separable(40)
    before = torch.get_rng_state()
    probes = [MageProbe(features, labels, 3, MageRecipe(epochs=2, batch_size=16, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(probes[0].weight, probes[1].weight) and not torch.equal(probes[0].weight, probes[2].weight)
