import math
import re

import pytest
import torch
from tiny_models import MODELS, tiny, train_step
from torch import nn

from genvision.errors import UserError
from genvision.training.config import OptimConfig
from genvision.training.optim import freeze_all_but, learning_rate, make_optimizer
from genvision.training.parts import named_parts


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


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_stays_until_the_last_steps(schedule):
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule, decay_steps=4)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[2:17] == [1.0] * 15 and 1 > rates[17] > rates[18] > rates[19] > 0
    short = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule, decay_steps=40)  # no longer than what follows the warm-up
    assert [learning_rate(short, step, 8) for step in range(8)] == [
        learning_rate(OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule), step, 8) for step in range(8)
    ]
    with pytest.raises(UserError, match=r"optim\.decay_steps 4: must be at least 1, for optim\.schedule cosine or linear"):
        OptimConfig(decay_steps=4)


def test_a_line_falls_by_equal_parts():
    config = OptimConfig(lr=2.0, warmup_steps=2, schedule="linear", final_lr_ratio=0.5)
    assert [learning_rate(config, step, 6) for step in range(2, 7)] == [2.0, 1.75, 1.5, 1.25, 1.0]


NAMES = {"attention": r"\.(attention|attn|attentions)\.|coder\.mid\.1\.", "norms": r"(^|\.)\w*norm\w*\.(weight|bias)$"}
"""What layers of a kind are called in our models: the implementation asks for classes."""


@pytest.mark.parametrize("word", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_changes_the_layers_of_a_kind_and_nothing_else(name, word):
    model = tiny(name)
    freeze_all_but(model, (word,))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_step(model)
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key])}
    wanted = {key for key in before if re.search(NAMES[word], key)}
    of_keys = {key for key in wanted if key.endswith("k.bias")}  # no output depends on them: their gradients are rounding, or zero
    assert changed | of_keys == wanted and len(changed) > len(of_keys)


def test_patterns_are_of_whole_names_and_words_of_their_beginnings():
    model = tiny("dit")
    names = {name for name, _ in model.named_parameters()}
    assert named_parts(model, ["*.attn.*"], "x") == {name for name in names if ".attn." in name}
    assert named_parts(model, ["blocks.*.norm?.weight", "head"], "x") == {
        *(f"blocks.{i}.norm{j}.weight" for i in range(2) for j in (1, 2)),
        *(name for name in names if name.startswith("head.")),
    }
    assert named_parts(model, ["blocks.1.attn"], "x") == {name for name in names if name.startswith("blocks.1.attn.")}


def test_parts_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"optim\.train_only \*\.norm9: the model has no part of that name; its parts are patch_embed, "):
        freeze_all_but(tiny("dit"), ("*.norm9",))
    with pytest.raises(UserError, match=r"optim\.train_only norms: the norms of this model have no weights; name other parts"):
        freeze_all_but(tiny("dit", norm="layer", use_qk_norm=False), ("norms",))
    with pytest.raises(UserError, match=r"optim\.train_only attention: the model has no attention"):
        freeze_all_but(tiny("vq", style="maskgit"), ("attention",))
    with pytest.raises(UserError, match=r"optim\.train_only posemb: nothing there is trained, these are fixed tables"):
        freeze_all_but(tiny("vitok", position_embedding="sincos2d"), ("posemb",))


def test_without_parts_all_is_trained():
    model = tiny("llamagen")
    freeze_all_but(model, ())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(make_optimizer(model, OptimConfig()), torch.optim.AdamW)
