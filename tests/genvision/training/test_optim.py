import math

import pytest
from torch import nn

from genvision.training.config import OptimConfig
from genvision.training.optim import learning_rate, make_optimizer


def test_norms_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    groups = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert [len(group["params"]) for group in groups] == [2, 3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_warm_up_rises_to_the_rate_and_constant_stays():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_rate_to_the_final_one():
    config = OptimConfig(lr=2.0, warmup_steps=2, schedule="cosine", final_lr_ratio=0.1)
    rates = [learning_rate(config, step, 102) for step in range(2, 102)]
    assert rates[0] == 2.0 and rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate(config, 102, 102) == pytest.approx(0.2)
