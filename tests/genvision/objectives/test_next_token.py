import math

import torch

from genvision.layers.token_loss import logits_loss
from genvision.objectives.next_token import NextToken


def test_the_model_is_shown_all_but_the_last_code_in_raster_order():
    seen = {}

    def model(codes, labels, targets):
        seen["codes"] = codes
        return logits_loss(torch.nn.functional.one_hot(batch["codes"].flatten(1), 7).float() * 50, targets)

    batch = {"codes": torch.randint(0, 7, (2, 3, 3)), "labels": torch.tensor([0, 1])}
    objective = NextToken(7)
    terms = objective(model, batch)
    assert torch.equal(seen["codes"], batch["codes"].flatten(1)[:, :-1])
    assert terms["accuracy"] == 1 and terms["loss"] < 1e-6
    assert objective.baselines == {"loss": math.log(7)}
