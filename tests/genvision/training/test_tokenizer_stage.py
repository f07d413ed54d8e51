"""What a tokenizer is trained on, and what it is measured by."""

import torch
from tiny_models import tiny
from torch import Tensor, nn

from genvision.tokenizers.lpips import layer_distance
from genvision.training.ema import EMA
from genvision.training.tokenizer_loss import TokenizerLossConfig
from genvision.training.tokenizer_stage import TokenizerStage


class OneLayer(nn.Module):
    """LPIPS on the images themselves."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return layer_distance(a, b, torch.ones(1, 3, 1, 1), dropout=0.5 if self.training else 0.0)


def test_the_dropout_inside_lpips_is_left_out_of_held_out_losses_alone():
    model = tiny("kl").eval()
    loss = TokenizerLossConfig(perceptual="lpips")
    stage = TokenizerStage(model, loss, perceptual=OneLayer(), seed=0, num_steps=1, steps_per_pass=1)
    batch, averages = {"images": torch.rand(4, 3, 8, 8) * 2 - 1}, EMA(model, ())
    first = stage.held_out_loss(model, batch, averages)["perceptual"]
    assert stage.held_out_loss(model, batch, averages)["perceptual"].equal(first)
    expected = layer_distance(batch["images"], model(batch["images"]).reconstruction, torch.ones(1, 3, 1, 1)).mean()
    assert first.equal(expected)
    assert not stage.loss(model, batch)["perceptual"].equal(stage.loss(model, batch)["perceptual"])


def test_the_codes_of_a_step_that_came_to_nothing_do_not_count():
    model = tiny("vq")
    stage = TokenizerStage(model, TokenizerLossConfig(), seed=0, num_steps=2, steps_per_pass=1)
    stage.loss(model, {"images": torch.rand(4, 3, 8, 8) * 2 - 1})
    assert stage.counts_of_step.sum() > 0
    stage.before_step(0, EMA(model, ()))
    assert stage.counts_of_step.sum() == 0
