"""The masked sampler: recorded decodings, nested networks, caches, known tokens, and images that do not depend on their batch."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.masked import MaskedSampler
from genvision.samplers.randomness import ImageStreams
from genvision.samplers.token_draws import TokenDraws
from parity_fixtures import Fixture


class RecordedDraws(TokenDraws):
    """The random numbers of a fixture: Gumbel noise [T, B, N, K] of tokens, [T, B, N] of the choice."""

    def __init__(self, tokens: Tensor, choice: Tensor) -> None:
        self.tokens, self.choice = tokens, choice

    def ids(self, step: int, logits: Tensor, where: Tensor) -> Tensor:
        noise = self.tokens[step, :, :, : logits.shape[-1]]
        return (logits + noise.gather(1, where.unsqueeze(2).expand_as(logits))).argmax(-1)

    def gumbel(self, step: int) -> Tensor:
        return self.choice[step]


@dataclass
class Watched:
    """What a generator was fed, step by step: the codes, once where conditional and null rows share a batch."""

    generator: Any
    codes: list[Tensor] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def note(_: Any, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            self.codes.append(inputs[0].clone())
            self.options.append(options)

        self.generator.register_forward_pre_hook(note, with_kwargs=True)

    def fed(self, rows: int) -> Tensor:
        return torch.stack([codes[:rows] for codes in self.codes])


def gumbel(uniform: Tensor) -> Tensor:
    """As 1d-tokenizer makes it."""
    return -torch.log((-torch.log(uniform.clamp(min=1e-20))).clamp(min=1e-20))


class TestRecordedDecodings:
    def test_mage(self):
        fixture = Fixture("mage_generate")
        watched = Watched(load_official("mage", fixture.state, fixture.config))
        draws = RecordedDraws(fixture.inputs["sample_gumbel"], fixture.inputs["choice_gumbel"])
        sampler = MaskedSampler(num_steps=8, choice_temperature=4.5)
        codes = sampler.decode(watched.generator, torch.zeros(2, dtype=torch.int64), draws)
        fed = fixture.outputs["model_input_ids"][:, :, 1:]
        assert torch.equal(watched.fed(2), fed.where(fed < 40, 40))
        assert torch.equal(codes.flatten(1), fixture.outputs["final_ids"])

    def test_the_original_maskgit(self):
        fixture = Fixture("maskgit_jax")
        watched = Watched(load_official("maskgit-jax", fixture.state, fixture.config))
        draws = RecordedDraws(fixture.inputs["sample_gumbel"][:, :, 1:], fixture.inputs["choice_gumbel"][:, :, 1:])
        steps = fixture.outputs["step_input_ids"]  # the class in front, -1 where unknown
        labels = steps[0, :, 0] - 40
        sampler = MaskedSampler(num_steps=6, choice_temperature=4.5, schedule_dtype="float32")
        codes = sampler.decode(watched.generator, labels, draws)
        assert torch.equal(watched.fed(2), steps[:, :, 1:].where(steps[:, :, 1:] >= 0, 40))
        assert torch.equal(codes.flatten(1), fixture.outputs["step_sampled_ids"][:, -1, 1:])

    @pytest.mark.parametrize("name", ["maskgit_bert", "maskgit_uvit"])
    def test_titoks_generators(self, name):
        fixture = Fixture(name)
        options = fixture.config["generate"]
        watched = Watched(load_official("maskgit-bert", fixture.state, fixture.config))
        draws = RecordedDraws(gumbel(fixture.inputs["uniform_logits"]), gumbel(fixture.inputs["uniform_confidence"]))
        decay = options["guidance_decay"]
        sampler = MaskedSampler(
            num_steps=6,
            schedule="arccos",
            confidence="logit",
            choice_temperature=options["randomize_temperature"],
            guidance_scale=options["guidance_scale"] + (decay == "constant"),  # theirs is on top of the conditional prediction there
            guidance_schedule=decay,
            guidance_power=options.get("guidance_scale_pow", 1.0),
        )
        codes = sampler.decode(watched.generator, fixture.inputs["labels"], draws)
        assert torch.equal(watched.fed(2), fixture.outputs["step_input_ids"])
        assert torch.equal(codes.flatten(1), fixture.outputs["final_ids"])

    def test_halton_maskgit(self):
        """Its sampler draws the unknown token, too, and clamps it at the end; ours offers it only if asked."""
        fixture = Fixture("halton_maskgit")
        watched = Watched(load_official("halton-maskgit", fixture.state, fixture.config))
        watched.generator.forward = partial(watched.generator.forward, whole_vocabulary=True)
        draws = RecordedDraws(fixture.inputs["sample_gumbel"], torch.empty(0))
        sampler = MaskedSampler(
            num_steps=6,
            schedule="arccos",
            order="halton",
            guidance_scale=1.7,
            temperature=1 / 0.8,
            final_temperature=1 / 1.2,
            warmup_steps=1,
        )
        codes = sampler.decode(watched.generator, fixture.inputs["labels"], draws)
        assert torch.equal(watched.fed(2), fixture.outputs["step_input_codes"].flatten(2))
        assert torch.equal(codes.clamp(max=39), fixture.outputs["final_codes"])


def tiny(**options: Any) -> MaskGIT:
    torch.manual_seed(0)
    sizes = {"codebook_size": 12, "grid_size": 4, "hidden_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3, "mlp_multiple_of": 4}
    model = MaskGIT(**sizes, init_std=0.4, **options)
    for name, parameter in model.named_parameters():
        if "modulation" in name:  # which start at zero
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    return tiny()


LABELS = torch.tensor([0, 1, 2, 1, 0])
SAMPLERS = {
    "confidence": MaskedSampler(num_steps=6),
    "logit": MaskedSampler(num_steps=5, confidence="logit", schedule="arccos", softmax_annealing=True),
    "halton": MaskedSampler(num_steps=6, order="halton", schedule="arccos", shift_order=True),
    "random": MaskedSampler(num_steps=16, order="random", top_k=4, top_p=0.9),
    "guided and cached": MaskedSampler(num_steps=6, guidance_scale=3.0, guidance_schedule="linear", use_cache=True),
    "nested": MaskedSampler(num_steps=6, nesting="4x2,2x2,1x2", use_cache=True, guidance_scale=2.0, guidance_stop=0.5),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_whatever_the_batch(model, name):
    sampler = SAMPLERS[name]
    together = sampler.sample(model, LABELS, ImageStreams(7, range(5)))
    assert together.shape == (5, 4, 4) and together.min() >= 0 and together.max() < 12
    assert sampler.calls.tolist() == [sampler.network_calls(model)] * 5
    apart = [sampler.sample(model, LABELS[i : i + 1], ImageStreams(7, [i])) for i in (3, 0)]
    assert torch.equal(torch.cat(apart), together[[3, 0]])
    assert not torch.equal(sampler.sample(model, LABELS, ImageStreams(8, range(5))), together)


@pytest.mark.parametrize("name", ["confidence", "logit", "halton", "guided and cached"])
def test_known_tokens_are_kept(model, name):
    known = torch.full((5, 4, 4), -1)
    known[:, :2] = torch.arange(8).view(2, 4)
    drawn = SAMPLERS[name].sample(model, LABELS, ImageStreams(7, range(5)), known=known)
    assert torch.equal(drawn[:, :2], known[:, :2]) and drawn.min() >= 0
    others = SAMPLERS[name].sample(model, LABELS, ImageStreams(8, range(5)), known=known.flatten(1))
    assert torch.equal(others[:, :2], known[:, :2]) and not torch.equal(others, drawn)


def test_few_unknown_tokens_take_few_steps(model):
    sampler = MaskedSampler(num_steps=12, nesting="4x4,2x4,1x4")
    watched = Watched(tiny())
    known = torch.arange(16).fmod(12).expand(2, -1).clone()
    known[:, [3, 9, 11]] = -1
    sampler.sample(watched.generator, LABELS[:2], ImageStreams(0, range(2)), known=known)
    assert sampler.calls.tolist() == [3, 3]
    assert [options["nesting"] for options in watched.options] == [4, 2, 1]
    assert [step.nesting for step in sampler.plan(16, 1)] == [1]


def test_all_known_is_given_back_and_none_known_is_drawn(model):
    sampler = SAMPLERS["confidence"]
    everything = torch.arange(32).fmod(12).view(2, 4, 4)
    assert torch.equal(sampler.sample(model, LABELS[:2], ImageStreams(0, range(2)), known=everything), everything)
    assert sampler.calls.tolist() == [0, 0]
    nothing = torch.full((2, 16), -1)
    drawn = sampler.sample(model, LABELS[:2], ImageStreams(0, range(2)), known=nothing)
    assert torch.equal(drawn, sampler.sample(model, LABELS[:2], ImageStreams(0, range(2))))


@pytest.mark.parametrize("order", ["halton", "random"])
def test_where_no_confidence_is_asked_its_options_change_nothing(model, order):
    sampler = MaskedSampler(num_steps=4, order=order)
    others = sampler.with_options(confidence="logit", choice_temperature=30.0)
    assert torch.equal(*(one.sample(model, LABELS, ImageStreams(0, range(5))) for one in (sampler, others)))


def test_temperature_0_is_the_most_likely_token_in_every_step(model):
    sampler = MaskedSampler(num_steps=4, order="halton", temperature=2.0, final_temperature=0.5).with_options(temperature=0.0)
    assert torch.equal(*(sampler.sample(model, LABELS, ImageStreams(seed, range(5))) for seed in (0, 1)))


def test_the_head_is_asked_about_what_it_must_say_only():
    watched = Watched(tiny())
    MaskedSampler(num_steps=4).sample(watched.generator, LABELS, ImageStreams(0, range(5)))
    for codes, options in zip(watched.codes, watched.options, strict=True):
        assert torch.equal(options["where"], (codes == 12).nonzero()[:, 1].view(5, -1))
    watched = Watched(tiny())
    MaskedSampler(num_steps=4, order="halton").sample(watched.generator, LABELS, ImageStreams(0, range(5)))
    assert sum(options["where"].shape[1] for options in watched.options) == 16


@pytest.mark.parametrize("build", [tiny, lambda: tiny(block="pre_norm", mlp="gelu", head="linear"), lambda: tiny_mage()])
class TestCache:
    def test_refreshed_at_every_step_it_changes_nothing(self, build):
        model = build()
        plain = MaskedSampler(num_steps=6, nesting="4x2,2x2,1x2")
        refreshed = plain.with_options(use_cache=True, refresh_every=1)
        assert torch.equal(*(sampler.sample(model, LABELS, ImageStreams(0, range(5))) for sampler in (plain, refreshed)))

    def test_only_what_is_masked_or_new_is_read(self, build):
        watched = Watched(build())
        sampler = MaskedSampler(num_steps=6, use_cache=True, refresh_every=4)
        sampler.sample(watched.generator, LABELS, ImageStreams(0, range(5)))
        steps = sampler.plan(16)
        assert [options["fresh"] is None for options in watched.options] == [True, False, False, False, True, False]
        for before, step, codes, options in zip(steps, steps[1:], watched.codes[1:], watched.options[1:], strict=False):
            if options["fresh"] is not None:
                assert options["fresh"].shape[1] == step.num_read == step.num_masked + before.num_revealed
                assert (codes.gather(1, options["fresh"]) == 12).sum(1).tolist() == [step.num_masked] * 5


def tiny_mage() -> MAGE:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 16, "depth": 2, "num_heads": 4, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4}
    return MAGE(codebook_size=12, grid_size=4, num_classes=3, **sizes).eval()


def test_smaller_networks_and_the_cache_save_work(model):
    """Multiply-adds of the blocks as MaGNeTS' arithmetic has them, in a network so wide that little else counts."""
    with torch.device("meta"):
        wide = MaskGIT(codebook_size=16, grid_size=16, hidden_dim=512, depth=12, num_heads=8, block="pre_norm", mlp="gelu", head="linear")
    plain = MaskedSampler(num_steps=12).multiply_adds(wide)
    saved = {
        "cache": MaskedSampler(num_steps=12, use_cache=True),
        "nested": MaskedSampler(num_steps=12, nesting="8x3,4x3,2x3,1x3"),
        "both": MaskedSampler(num_steps=12, nesting="8x3,4x3,2x3,1x3", use_cache=True),
    }
    ratios = {name: plain / sampler.multiply_adds(wide) for name, sampler in saved.items()}
    assert ratios == pytest.approx({"cache": 1.34, "nested": 2.13, "both": 3.11}, rel=0.01)
    guided = MaskedSampler(num_steps=12, guidance_scale=2.0)
    assert guided.multiply_adds(wide) == 2 * plain and guided.network_calls(wide) == 24


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"schedule": "quadratic"}, "schedule"),
        ({"order": "raster"}, "order"),
        ({"confidence": "margin"}, "confidence"),
        ({"choice_temperature": -1.0}, "choice_temperature"),
        ({"temperature": 1.0, "final_temperature": 0.0}, "final_temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"nesting": "2x3"}, "nesting"),
        ({"schedule_dtype": "float16"}, "schedule_dtype"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(UserError, match=word):
        MaskedSampler(**options)


def test_an_autoregressive_sampler_refuses_a_model_of_masked_tokens(model):
    with pytest.raises(UserError, match="MaskGIT masked ones"):
        AutoregressiveSampler().check(model)


@pytest.mark.parametrize(
    ("sampler", "build", "word"),
    [
        (MaskedSampler(num_steps=17), tiny, "more than the 16 tokens"),
        (MaskedSampler(nesting="3"), tiny, "nesting 3"),
        (MaskedSampler(guidance_scale=2.0), lambda: tiny(class_dropout=0.0), "no null class"),
        (MaskedSampler(guidance_scale=2.0), lambda: MAGE(codebook_size=4, grid_size=4, class_dropout=1.0, **SMALL_MAGE), "unconditional"),
        (MaskedSampler(order="halton"), lambda: tiny(sequence_length=16), "square grids"),
    ],
)
def test_what_a_model_cannot_do_is_refused(sampler, build, word):
    with pytest.raises(UserError, match=word):
        sampler.check(build())


SMALL_MAGE = {"num_classes": 1, "hidden_dim": 8, "depth": 1, "num_heads": 2, "decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def test_impossible_known_tokens_are_refused(model):
    with pytest.raises(UserError, match="the same places"):
        known = torch.tensor([[-1] * 16, [0] + [-1] * 15])
        MaskedSampler().sample(model, LABELS[:2], ImageStreams(0, range(2)), known=known)
