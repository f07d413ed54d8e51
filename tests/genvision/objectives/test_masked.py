import math

import pytest
import torch

from genvision.errors import UserError
from genvision.layers.token_loss import TokenTargets, logits_loss
from genvision.models.llamagen import LlamaGen
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.objectives.masked import MaskedLossConfig, MaskedTokens
from parity_fixtures import Fixture

K, B = 12, 6
TINY = {"codebook_size": K, "grid_size": 4, "hidden_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3, "dropout": 0.0}
MAGE_LOSS = {"mask_law": "truncated_normal", "min_ratio": 0.5, "drop_ratio": 0.5, "reduction": "batch"}


def maskgit(**options):
    torch.manual_seed(0)
    return MaskGIT(**TINY, block="pre_norm", mlp="gelu", head="linear", **options)


def mage(**options):
    torch.manual_seed(0)
    return MAGE(**TINY, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, **options)


def batch(views=()):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, K, (B, *views, 4, 4), generator=generator)
    return {"codes": codes, "labels": torch.arange(B) % 3, "positions": torch.arange(40, 40 + B)}


def objective(model, step=0, **options):
    made = MaskedTokens(MaskedLossConfig(**options), model, seed=7, num_steps=100)
    made.begin_step(step, None)
    return made


def test_loss_of_the_original_maskgit_from_its_logits():
    fixture = Fixture("maskgit_jax")
    targets = TokenTargets(fixture.inputs["targets"], fixture.inputs["loss_weights"], "sample", smoothing=0.1)
    torch.testing.assert_close(logits_loss(fixture.outputs["logits"], targets).loss, fixture.outputs["loss"], atol=fixture.atol, rtol=0)


def test_loss_of_the_original_mage_from_its_logits():
    fixture = Fixture("mage_pretrain")
    logits = fixture.outputs["logits"][:, 1:, : fixture.config["codebook_size"]]
    targets = TokenTargets(fixture.inputs["token_indices"], fixture.outputs["token_all_mask"][:, 1:], "batch", smoothing=0.1)
    torch.testing.assert_close(logits_loss(logits, targets).loss, fixture.outputs["loss"], atol=fixture.atol, rtol=0)


@pytest.mark.parametrize("visible_weight", [0.0, 0.1, 1.0])
def test_visible_tokens_cost_their_weight(visible_weight):
    model, data = maskgit(class_dropout=0.5), batch()
    made = objective(model, visible_weight=visible_weight, reduction="batch", label_smoothing=0.0)
    terms, task = made(model, data), made.task(data)
    masked, targets = task.codes == model.mask_id, data["codes"].flatten(1)
    assert 0 < masked.sum() < masked.numel() and torch.equal(task.codes[~masked], targets[~masked])
    logits = model(task.codes, data["labels"], drop=task.told["drop"])
    costs = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    weights = torch.where(masked, 1.0, visible_weight)
    torch.testing.assert_close(terms["loss"], (costs * weights).sum() / weights.sum())
    torch.testing.assert_close(terms["accuracy"], (logits.argmax(-1) == targets)[masked].float().mean())
    torch.testing.assert_close(terms["masked"], masked.float().mean())
    assert made.baselines == {"loss": math.log(K)}


def test_mage_predicts_masked_tokens_alone_from_a_half_of_them():
    model, data = mage(), batch()
    made = objective(model, step=3, **MAGE_LOSS)
    task = made.task(data)
    assert (task.codes.gather(1, task.told["where"]) == model.mask_id).all() and task.told["kept"].shape == (B, 8)
    every = model(task.codes, data["labels"], drop=task.told["drop"], kept=task.told["kept"])
    wanted = TokenTargets(data["codes"].flatten(1), task.codes == model.mask_id, "batch", smoothing=0.1)
    torch.testing.assert_close(made(model, data)["loss"], logits_loss(every, wanted).loss)


@pytest.mark.parametrize("build, options", [(maskgit, {}), (mage, MAGE_LOSS)])
def test_a_batch_in_parts_costs_and_masks_the_same(build, options):
    model, data = build(class_dropout=0.5), batch()
    made = objective(model, step=2, **options)
    parts = [dict(zip(data, values, strict=True)) for values in zip(*(v.chunk(3) for v in data.values()), strict=True)]
    torch.testing.assert_close(torch.stack([made(model, part)["loss"] for part in parts]).mean(), made(model, data)["loss"])
    assert torch.equal(torch.cat([made.task(part).codes for part in parts]), made.task(data).codes)
    dropped = made.task(data).told["drop"]
    assert dropped.any() and not dropped.all()


def test_views_are_masked_apart_and_told_from_those_of_other_images():
    model, data = mage(contrastive_dim=5, class_dropout=1.0), batch((2,))
    made = objective(model, **MAGE_LOSS, contrastive_weight=0.5)
    task = made.task(data)
    assert torch.equal(task.targets, torch.cat([data["codes"][:, 0], data["codes"][:, 1]]).flatten(1).gather(1, task.told["where"]))
    masked = task.codes == model.mask_id
    assert not torch.equal(masked[:B], masked[B:])
    terms = made(model, data)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.5 * terms["contrastive"])
    assert made.baselines == {"reconstruction": math.log(K)}
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_all_nested_networks_learn_a_batch():
    model, data = maskgit(), batch()
    made = objective(model, nested=(2, 4), teacher="next")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(30):
        made.begin_step(step, None)
        terms = made(model, data)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append([float(terms[name]) for name in ("loss_p1", "loss_p2", "loss_p4")])
    assert all(last < first - 0.4 for first, last in zip(losses[0], losses[-1], strict=True))


@pytest.mark.parametrize(
    "build, options, message",
    [
        (maskgit, {"min_ratio": 0.5, "drop_ratio": 0.5}, "drop_ratio 0.5: only mage"),
        (maskgit, {"contrastive_weight": 0.1}, "contrastive_weight 0.1 is for mage"),
        (mage, {"contrastive_weight": 0.1}, "model.contrastive_dim above 0"),
        (lambda: mage(contrastive_dim=4), {}, "model.contrastive_dim is trained by the contrastive loss alone"),
        (maskgit, {"nested": (8,)}, "loss.nested: nesting 8 is not possible"),
        (mage, {"nested": (4,)}, "loss.nested: nesting 4 is not possible"),
        (
            lambda: LlamaGen(codebook_size=4, grid_size=2, hidden_dim=8, depth=1, num_heads=2, num_classes=2),
            {},
            "LlamaGen does not predict",
        ),
        (maskgit, {"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]"),
        (maskgit, {"contrastive_temperature": 0.0}, "contrastive_temperature must be above 0"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_training(build, options, message):
    with pytest.raises(UserError, match=message):
        objective(build(), **options)


def test_a_contrastive_loss_needs_two_views():
    model = mage(contrastive_dim=4)
    with pytest.raises(UserError, match=r"codes of two views of each image, of shape \[2, 4, 4\], got \[4, 4\]"):
        objective(model, contrastive_weight=0.1)(model, batch())
