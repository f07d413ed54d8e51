import math

import torch

from genvision.objectives.next_token import NextToken, next_token_loss


def test_loss_is_the_mean_of_minus_log_probabilities():
    logits, targets = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(next_token_loss(logits, targets), -picked.mean())
    valid = torch.tensor([1, 0, 1])
    torch.testing.assert_close(next_token_loss(logits, targets, valid), -picked[[0, 2]].mean())
    assert next_token_loss(logits, targets, torch.zeros(3)) == 0


def test_the_model_is_shown_all_but_the_last_code_in_raster_order():
    seen = {}

    def model(codes, labels):
        seen["codes"] = codes
        return torch.nn.functional.one_hot(batch["codes"].flatten(1), 7).float() * 50

    batch = {"codes": torch.randint(0, 7, (2, 3, 3)), "labels": torch.tensor([0, 1])}
    objective = NextToken(7)
    terms = objective(model, batch)
    assert torch.equal(seen["codes"], batch["codes"].flatten(1)[:, :-1])
    assert terms["accuracy"] == 1 and terms["loss"] < 1e-6
    assert objective.baselines == {"loss": math.log(7)}
