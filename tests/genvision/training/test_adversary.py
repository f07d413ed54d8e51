"""A discriminator in the training of a tokenizer: who is trained when, by what."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from genvision.errors import UserError
from genvision.tokenizers.adversarial import generator_loss
from genvision.tokenizers.vq import VQTokenizer
from genvision.training.adversary import Discrimination
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, TrainConfig
from genvision.training.loop import train
from genvision.training.optim import freeze_all_but
from genvision.training.tokenizer_loss import AdversarialConfig, TokenizerLossConfig
from genvision.training.tokenizer_stage import TokenizerStage

IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
OPTIM = OptimConfig(lr=1e-3, betas=(0.5, 0.9))


def tokenizer() -> VQTokenizer:
    sizes = dict(
        codebook_size=16, codebook_dim=4, base_channels=4, encoder_multipliers=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=2
    )
    return VQTokenizer(image_size=8, **sizes)


def stage(num_steps=8, **adversarial) -> TokenizerStage:
    torch.manual_seed(1)
    options = {"discriminator": "patchgan", "width": 4, "num_layers": 1} | adversarial
    loss = TokenizerLossConfig(adversarial=AdversarialConfig(**options))
    adversary = Discrimination(loss.adversarial, OPTIM, 8)
    return TokenizerStage(tokenizer(), loss, adversary=adversary, seed=0, num_steps=num_steps, steps_per_pass=8)


def stream(start_step, rank, world_size):
    for step in range(start_step, 1000):
        yield {"images": IMAGES[torch.randint(64, (8,), generator=torch.Generator().manual_seed(step))]}


def run(output: Path, its_stage: TokenizerStage, num_steps=8, **loop) -> list[dict]:
    output.mkdir()
    options = {"batch_size": 8, "ema_decays": (), "log_every": 1, "checkpoint_every": 100, "preview_every": 0} | loop
    train_config = TrainConfig(
        stage="tokenizer",
        output_dir=str(output),
        model={},
        data=DataConfig(spec="none"),
        optim=OPTIM,
        train=LoopConfig(num_steps=num_steps, **options),
    )
    assert train(train_config, Accelerator(cpu=True), its_stage, stream)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(network: torch.nn.Module) -> dict:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_the_discriminator_is_trained_from_its_start_and_the_tokenizer_hears_it_later(tmp_path):
    its_stage = stage(discriminator_start=2, start=4, ramp=2)
    lines = run(tmp_path / "run", its_stage)
    trained = ["discriminator" in line for line in lines]
    heard = [line.get("adversarial_weight") for line in lines]
    assert trained == [False] * 2 + [True] * 6
    # the ramp is at 0 in step 4, counted from 0, where it begins
    assert heard == [None] * 5 + [0.25, 0.5, 0.5]
    assert all(0 <= line["discriminator_accuracy"] <= 1 for line in lines[2:])


def test_before_its_start_the_tokenizer_is_trained_as_without_a_discriminator(tmp_path):
    with_one, without = stage(start=6), stage()
    without.adversary = None
    run(tmp_path / "a", with_one, num_steps=6)
    run(tmp_path / "b", without, num_steps=6)
    for name, value in weights(with_one.model).items():
        assert torch.equal(value, weights(without.model)[name])


def test_a_discriminator_tells_images_from_reconstructions_when_it_is_trained(tmp_path):
    its_stage = stage(start=10_000, lr=1e-2)
    before = weights(its_stage.adversary.network)
    lines = run(tmp_path / "run", its_stage, num_steps=60)
    assert all(not torch.equal(value, before[name]) for name, value in weights(its_stage.adversary.network).items())
    assert sum(line["discriminator"] for line in lines[-10:]) < 0.8 * sum(line["discriminator"] for line in lines[:10])
    assert lines[-1]["discriminator_accuracy"] > 0.6


def test_each_loss_reaches_its_own_network_alone():
    its_stage = stage(feature_matching_weight=1.0)
    network, batch = its_stage.adversary.network, {"images": IMAGES[:8]}
    its_stage.loss(its_stage.model, batch)["loss"].backward()
    assert all(p.grad is None for p in network.parameters())
    gradients = {name: p.grad.clone() for name, p in its_stage.model.named_parameters()}
    its_stage.adversary.loss(batch)["adversary_loss"].backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in its_stage.model.named_parameters())


def test_the_adaptive_weight_makes_both_gradients_equally_long_at_the_last_layer():
    its_stage = stage(adaptive=True, weight=1.0)
    terms = its_stage.loss(its_stage.model, {"images": IMAGES[:8]})
    last = its_stage.model.last_layer
    pulls = [torch.autograd.grad(terms[name], last, retain_graph=True)[0].norm() for name in ("reconstruction", "adversarial_loss")]
    torch.testing.assert_close(pulls[1], pulls[0], rtol=2e-2, atol=0)
    torch.testing.assert_close(terms["adversarial_loss"], terms["adversarial_weight"] * terms["adversarial"])


def test_the_loss_is_the_sum_of_what_is_named():
    its_stage = stage(weight=0.3)
    terms = its_stage.loss(its_stage.model, {"images": IMAGES[:8]})
    parts = [terms[name] for name in ("reconstruction", "codebook", "commitment", "adversarial_loss")]
    torch.testing.assert_close(terms["loss"], torch.stack(parts).sum())
    with torch.no_grad():
        logits = its_stage.adversary.network(its_stage.adversary.reconstruction)
    torch.testing.assert_close(terms["adversarial_loss"], 0.3 * generator_loss("hinge", logits))


def test_accumulated_parts_train_both_networks_as_the_whole_batch_does(tmp_path):
    # a discriminator without BatchNorm, which would see parts of the batch
    kind = dict(discriminator="stylegan", width=8, r1_weight=0.1)
    whole, parts = stage(**kind), stage(**kind)
    run(tmp_path / "a", whole, num_steps=4)
    run(tmp_path / "b", parts, num_steps=4, accumulation=2)
    for network in (lambda s: s.model, lambda s: s.adversary.network):
        ours, theirs = weights(network(whole)), weights(network(parts))
        assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours if not name.endswith(".k.bias"))


def test_only_the_parts_that_are_named_are_trained(tmp_path):
    its_stage = stage()
    freeze_all_but(its_stage.model, ("decoder", "post_quant_conv"))
    before = weights(its_stage.model)
    run(tmp_path / "run", its_stage, num_steps=2)
    moved = {name for name, value in weights(its_stage.model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}
    with pytest.raises(UserError, match=r"optim\.train_only decode: the model has no part of that name; its parts are encoder, decoder"):
        freeze_all_but(its_stage.model, ("decode",))


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="discriminator_start 5 is after start 2"):
        AdversarialConfig(discriminator="patchgan", start=2, discriminator_start=5)
    with pytest.raises(UserError, match=r"loss\.adversarial\.weight must be at least 0, got -1"):
        AdversarialConfig(weight=-1)
    with pytest.raises(UserError, match="at least 24x24 pixels, got 8x8"):
        Discrimination(AdversarialConfig(discriminator="patchgan"), OPTIM, 8)
