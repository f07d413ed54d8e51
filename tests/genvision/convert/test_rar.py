"""RAR of the original implementation: its outputs, its draws, and its recorded sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.rar import RAR
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.randomness import ImageStreams
from parity_fixtures import Fixture, manifest

SIZES = {"b": (768, 24, 3072), "l": (1024, 24, 4096), "xl": (1280, 32, 5120), "xxl": (1408, 40, 6144)}
"""Width, depth, feed-forward width."""


def arguments(size: str) -> dict:
    hidden, depth, mlp = SIZES[size]
    return {"hidden_size": hidden, "num_hidden_layers": depth, "num_attention_heads": 16, "intermediate_size": mlp}


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("rar")


@pytest.fixture(scope="module")
def model(fixture) -> RAR:
    return load_official("rar", fixture.state, fixture.config)


class Recorded(ImageStreams):
    """The numbers that the original drew with, [N, B]."""

    def __init__(self, uniform: torch.Tensor) -> None:
        super().__init__(0, range(uniform.shape[1]))
        self.recorded = uniform.T.double()

    def uniform(self, purpose, count, *, step=0):
        return self.recorded[:, :count]


@torch.inference_mode()
def test_logits_labels_and_loss_in_a_given_order_are_the_original_ones(fixture, model):
    tokens, labels, orders = (fixture.inputs[name] for name in ("tokens", "labels", "orders"))
    logits, permuted = model(tokens, labels, orders=orders), tokens.gather(1, orders)
    torch.testing.assert_close(logits, fixture.outputs["logits_permuted"][:, :-1], atol=fixture.atol, rtol=0)
    assert torch.equal(permuted, fixture.outputs["labels_permuted"])
    torch.testing.assert_close(
        F.cross_entropy(logits.flatten(0, 1), permuted.flatten()), fixture.outputs["loss_permuted"], atol=fixture.atol, rtol=0
    )


@torch.inference_mode()
def test_logits_in_raster_order_with_and_without_a_class_are_the_original_ones(fixture, model):
    tokens, labels = fixture.inputs["tokens"], fixture.inputs["labels"]
    null = torch.full_like(labels, model.null_label)
    torch.testing.assert_close(model(tokens, labels), fixture.outputs["logits_raster"][:, :-1], atol=fixture.atol, rtol=0)
    torch.testing.assert_close(model(tokens, null), fixture.outputs["logits_raster_uncond"][:, :-1], atol=fixture.atol, rtol=0)


def test_drawn_tokens_are_the_original_ones(fixture, model):
    config = fixture.config
    sampler = AutoregressiveSampler(
        guidance_scale=config["guidance_scale"],
        guidance_schedule="power-cosine",
        guidance_power=config["guidance_scale_pow"],
        temperature=config["randomize_temperature"],
    )
    drawn = sampler.sample(model, fixture.inputs["labels"], Recorded(fixture.inputs["uniform"]))
    assert torch.equal(drawn.flatten(1), fixture.outputs["generated"])


@pytest.mark.parametrize("size", SIZES)
def test_an_official_file_fills_the_model_of_its_size(size):
    recorded = manifest(f"rar_{size}")
    with torch.device("meta"):
        model = load_official("rar", {name: torch.empty(shape) for name, shape in recorded["tensors"].items()}, arguments(size))
    width, depth, _ = SIZES[size]
    unused = (1022 + 1024 + 98 + 1) * width  # two tables of positions, one of places, the mask token
    assert sum(p.numel() for p in model.parameters()) == recorded["params"] - unused
    assert len(model.blocks) == depth and model.code_shape == (16, 16) and math.prod(model.code_shape) == model.num_tokens


def test_tensors_that_do_not_fit_are_named(fixture):
    state, config = fixture.state, fixture.config
    for name in ("pos_embed", "embeddings.weight", "blocks.1.attn.k_norm.bias"):
        with pytest.raises(UserError, match="tensors do not fit RAR: missing"):
            load_official("rar", {other: tensor for other, tensor in state.items() if other != name}, config)
    with pytest.raises(UserError, match=r"position_table is 18x32, expected 11x32"):
        load_official("rar", state, config | {"image_seq_len": 9})
    with pytest.raises(UserError, match=r"label_embed.table.weight is 11x32, expected 8x32"):
        load_official("rar", state, config | {"condition_num_classes": 7})
