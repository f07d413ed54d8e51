import math

import pytest
import torch

from genvision.errors import UserError
from genvision.layers.token_loss import logits_loss
from genvision.models.rar import RAR
from genvision.objectives.draws import TrainingDraws
from genvision.objectives.permuted import PermutedLossConfig, PermutedTokens, token_orders


def tiny(**changes) -> RAR:
    options = dict(codebook_size=7, grid_size=2, hidden_dim=16, depth=1, num_heads=2, num_classes=3)
    no_dropout = dict(attention_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0)
    return RAR(**(options | no_dropout | changes))


def batch_of(num: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 7, (num, 2, 2), generator=generator)
    return {"codes": codes, "labels": torch.arange(num) % 3, "positions": torch.arange(40, 40 + num)}


def test_random_orders_give_way_linearly_between_the_ends():
    config = PermutedLossConfig(anneal_start=100, anneal_end=300)
    assert [config.random_share(step) for step in (0, 100, 150, 200, 299, 300, 1000)] == [1.0, 1.0, 0.75, 0.5, 0.005, 0.0, 0.0]
    assert PermutedLossConfig(anneal_start=5, anneal_end=5).random_share(4) == 1
    assert PermutedLossConfig(anneal_start=0, anneal_end=0).random_share(0) == 0


def test_an_order_depends_on_seed_and_position_alone():
    positions = torch.arange(200)
    orders, is_random = token_orders(TrainingDraws(5, positions), 9, 0.5)
    backwards, _ = token_orders(TrainingDraws(5, positions.flip(0)), 9, 0.5)
    assert torch.equal(backwards.flip(0), orders)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(9).expand(200, -1))
    assert torch.equal(orders[~is_random], torch.arange(9).expand(int((~is_random).sum()), -1))
    assert 70 < int(is_random.sum()) < 130
    always, _ = token_orders(TrainingDraws(5, positions), 9, 1.0)
    assert torch.equal(always[is_random], orders[is_random])  # the share decides whether, not which
    assert not torch.equal(token_orders(TrainingDraws(6, positions), 9, 1.0)[0], always)


def test_every_token_comes_first_equally_often():
    orders, _ = token_orders(TrainingDraws(0, torch.arange(2000)), 4, 1.0)
    counts = orders[:, 0].bincount(minlength=4)
    assert ((counts - 500).abs() < 80).all()  # four standard deviations


def test_loss_and_accuracy_compare_logits_with_the_tokens_in_their_order():
    told = {}

    def model(codes, labels, *, orders, drop, targets):
        told.update(orders=orders, drop=drop)
        return logits_loss(50 * torch.nn.functional.one_hot(codes.gather(1, orders), 7).float(), targets)

    objective = PermutedTokens(PermutedLossConfig(anneal_start=0, anneal_end=10), tiny(class_dropout=0.5), seed=0)
    assert objective.baselines == {"loss": math.log(7)}
    objective.begin_step(5, None)
    batch = batch_of(64)
    terms = objective(model, batch)
    assert terms["accuracy"] == 1 and terms["loss"] < 1e-6
    assert 0.3 < terms["random_order"] < 0.7 and 16 < int(told["drop"].sum()) < 48
    objective.begin_step(10, None)
    assert objective(model, batch)["random_order"] == 0
    assert torch.equal(told["orders"], torch.arange(4).expand(64, -1))


def test_what_is_drawn_belongs_to_the_position():
    model = tiny()
    objective, batch = PermutedTokens(PermutedLossConfig(), model, seed=3), batch_of(6)
    whole = objective(model, batch)["loss"]
    parts = [objective(model, {name: value[i : i + 2] for name, value in batch.items()})["loss"] for i in (4, 0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_loss_falls_on_one_batch():
    model, batch = tiny(), batch_of(8)
    objective, optimizer = PermutedTokens(PermutedLossConfig(), model, seed=0), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = objective(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(7), abs=0.1) and losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("options", "name"), [({"anneal_start": -1}, "anneal_start"), ({"anneal_end": 5}, "anneal_end")])
def test_impossible_options_are_refused(options, name):
    with pytest.raises(UserError, match=f"loss.{name}"):
        PermutedLossConfig(**options)
