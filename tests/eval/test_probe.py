"""Probes: their classifiers in exact small cases, and a tiny trained generator read without labels."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.probe import ProbeResult, probe
from genvision.eval.probe_config import ProbeConfig
from genvision.eval.probe_features import pool_states
from genvision.eval.probe_heads import LinearProbe, classify_by_neighbours, fit_linear_probe, train_attentive_heads
from genvision.eval.probe_report import format_probe, probe_chart
from genvision.eval.report import to_json
from genvision.eval.result import validate
from genvision.eval.sets import ArraySource
from genvision.models.llamagen import LlamaGen
from genvision.pipeline import ImagePipeline

QUICK = ProbeConfig(poolings=("mean", "attentive"), k=5, weight_decays=(1e-3, 1e-1), attentive_epochs=2)


@pytest.fixture(scope="module")
def pipeline(tiny_model) -> ImagePipeline:
    return ImagePipeline.from_pretrained(tiny_model)


def run(pipeline, train="digits:first", test="digits:second", config=QUICK, **options) -> ProbeResult:
    sources = [open_source(source) if isinstance(source, str) else source for source in (train, test)]
    return probe(pipeline.generator, pipeline.tokenizer, *sources, config=config, **options)


@pytest.fixture(scope="module")
def result(pipeline) -> ProbeResult:
    return run(pipeline, model="tiny & small")


def test_hidden_states_know_more_than_chance_and_raw_pixels_are_held_against_them(result):
    assert result.chance < 0.12
    assert [(row["layer"], row["pooling"], row["probe"]) for row in result.rows] == [
        (0, "mean", "knn"),
        (0, "mean", "linear"),
        (1, "mean", "knn"),
        (1, "mean", "linear"),
        (0, "attentive", "attentive"),
        (1, "attentive", "attentive"),
    ]
    assert all(row["top1"] > 0.18 for row in result.rows if row["probe"] != "attentive")
    assert all(row["interval"][0] < row["top1"] < row["interval"][1] for row in result.rows)
    pixels = {row["probe"]: row["top1"] for row in result.baselines if row["input"] == "pixels"}
    assert pixels["knn"] > 0.9 and pixels["linear"] > 0.9
    assert {row["input"] for row in result.baselines} == {"pixels", "codes (one-hot)"}
    assert any("raw pixels do as well or better" in line for line in result.warnings)


def test_the_best_row_is_the_one_that_held_out_training_images_choose(result):
    best = max(result.rows, key=lambda row: row["held_out"])
    assert (result.layer, result.pooling, result.probe, result.top1) == (best["layer"], best["pooling"], best["probe"], best["top1"])
    assert (result.num_train, result.num_held_out, result.num_test) == (898, 90, 899)


def test_equal_seeds_give_equal_results_and_the_global_state_is_left_alone(pipeline, result):
    before = torch.get_rng_state()
    again = run(pipeline, model="tiny & small")
    assert torch.equal(torch.get_rng_state(), before)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(result, seconds=0)


def test_no_label_reaches_the_features(pipeline, digits_first, digits_second):
    """With labels that mean nothing nothing can be learnt; a label that went in would come out again."""
    rng = np.random.default_rng(0)
    train, test = (ArraySource(images, rng.permutation(labels)) for images, labels in (digits_first, digits_second))
    result = run(pipeline, train, test)
    assert all(row["top1"] < 0.17 for row in [*result.rows, *result.baselines])


def test_hidden_states_are_those_of_the_null_label(pipeline):
    generator = pipeline.generator
    codes = torch.randint(0, 16, (3, 4, 4))
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in generator.blocks]
    with torch.no_grad():
        generator(codes.flatten(1), torch.full((3,), generator.null_label))
        expected = seen.pop()
        states = generator.hidden_states(codes, [1, 0])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(states[0], expected)
    assert [tuple(s.shape) for s in states] == [(3, 17, 32), (3, 17, 32)]
    torch.testing.assert_close(states[1][:, 1:], generator.token_embed(codes.flatten(1)))


def test_hidden_states_of_a_text_model_are_those_of_no_text():
    torch.manual_seed(0)
    model = LlamaGen(8, grid_size=2, hidden_dim=16, depth=2, num_heads=2, condition="text", text_length=3, text_dim=5).eval()
    codes = torch.randint(0, 8, (2, 4))
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(codes, torch.randn(2, 3, 5), drop=torch.tensor([True, True]))
        torch.testing.assert_close(model.hidden_states(codes, [2])[0], seen[0])


def test_the_result_is_json_of_its_schema_a_table_and_a_chart(result):
    content = json.loads(to_json(result))
    validate(content, "probe", ProbeResult)
    assert content["schema"] == "genvision.probe/1" and content["condition"] == "null"
    table = format_probe(result)
    assert "layer  mean, knn  mean, linear  attentive" in table and "raw pixels, knn" in table
    chart = probe_chart(result)
    root = ET.fromstring(chart)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "tiny &amp; small" in chart
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 6  # three methods, two raw inputs, chance
    alone = dataclasses.replace(result, rows=[row for row in result.rows if row["layer"] == 1])
    assert len(ET.fromstring(probe_chart(alone)).findall(".//{http://www.w3.org/2000/svg}polyline")) == 3


def test_some_layers_and_some_images(pipeline):
    config = dataclasses.replace(QUICK, layers=(1,), poolings=("mean",))
    few = run(pipeline, config=config, num_train=60, num_test=40)
    assert {row["layer"] for row in few.rows} == {1}
    assert (few.num_train, few.num_test, few.num_held_out, few.attentive_epochs) == (60, 40, 6, None)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"layers": (2,)}, {}, "layer 2 is not there; the model has 1 blocks"),
        ({"poolings": ("class",)}, {}, "condition of LlamaGen stands before the image and sees nothing of it; choose mean or attentive"),
        ({"k": 50}, {"num_train": 50}, "50 training images are too few for k = 50"),
        ({}, {"num_train": 899}, "899 images are wanted, it holds 898"),
        ({}, {"num_test": 0}, "0 images are wanted"),
    ],
)
def test_what_cannot_be_probed_is_refused(pipeline, changes, options, message):
    with pytest.raises(UserError, match=message):
        run(pipeline, config=dataclasses.replace(QUICK, **changes), **options)


def test_a_model_without_a_null_label_is_refused(pipeline):
    generator = LlamaGen(16, grid_size=4, hidden_dim=16, depth=1, num_heads=2, num_classes=10, class_dropout=0.0).eval()
    with pytest.raises(UserError, match="without a null label"):
        run(ImagePipeline(generator, pipeline.tokenizer, pipeline.sampler, [str(i) for i in range(10)]))
    with pytest.raises(UserError, match="without a null condition"):
        generator.hidden_states(torch.zeros(1, 16, dtype=torch.int64), [0])


@pytest.mark.parametrize("wrong", [{"poolings": ("max",)}, {"k": 0}, {"temperature": 0.0}, {"seed": -1}, {"batch_size": 0}])
def test_impossible_settings_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(UserError, match="pooling 'max' is unknown" if name == "poolings" else name):
        ProbeConfig(**wrong)


def test_the_set_itself_as_test_set_is_no_test(pipeline):
    result = run(
        pipeline, test="digits:first", config=dataclasses.replace(QUICK, layers=(0,), poolings=("mean",)), num_train=100, num_test=10
    )
    assert any("tested on the images that they are trained on" in line for line in result.warnings)


def test_pooling_takes_the_positions_that_it_names():
    states = torch.arange(12.0).reshape(1, 4, 3)
    torch.testing.assert_close(pool_states(states, "mean", 1), states[:, 1:].mean(1))
    torch.testing.assert_close(pool_states(states, "class", 1), states[:, 0])


class TestNeighbours:
    def test_the_nearest_in_angle_wins_whatever_its_length(self):
        train = torch.tensor([[100.0, 1.0], [0.0, 0.1], [0.1, 1.0]])
        labels = torch.tensor([0, 1, 2])
        test = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.02, 0.2]])
        assert classify_by_neighbours(train, labels, test, 3, k=1).tolist() == [0, 1, 2]

    def test_votes_are_weighted_by_nearness_and_temperature(self):
        # cosines 1, 0.6, 0.6 with labels 0, 1, 1: one near vote against two far ones
        train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
        labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
        # 0 wins where exp(1 / t) > 2 exp(0.6 / t), that is t < 0.4 / ln 2 = 0.577
        assert classify_by_neighbours(train, labels, test, 2, k=3, temperature=0.57).item() == 0
        assert classify_by_neighbours(train, labels, test, 2, k=3, temperature=0.59).item() == 1
        assert classify_by_neighbours(train, labels, test, 2, k=3, temperature=1e-3).item() == 0

    def test_chunks_of_test_rows_change_nothing(self, monkeypatch):
        train, labels, test = torch.randn(50, 4), torch.randint(0, 3, (50,)), torch.randn(30, 4)
        whole = classify_by_neighbours(train, labels, test, 3, k=7)
        monkeypatch.setattr("genvision.eval.probe_heads.TEST_ROWS", 7)
        assert torch.equal(classify_by_neighbours(train, labels, test, 3, k=7), whole)


class TestLinear:
    def test_it_reaches_the_optimum_of_logistic_regression(self):
        """The gradient vanishes there, which no other point of this convex loss can claim."""
        features, labels = torch.randn(200, 5) * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0]) + 3, torch.randint(0, 3, (200,))
        fitted = LinearProbe(features, labels, 3, weight_decay=0.01)
        standard = (features - features.mean(0)) / features.std(0, correction=0)
        weight, bias = fitted.weight.clone().requires_grad_(), fitted.bias.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(standard @ weight + bias, labels) + 0.005 * weight.square().sum()
        loss.backward()
        assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4

    def test_scale_and_constant_features_do_not_matter(self):
        features, labels = torch.randn(100, 4), torch.randint(0, 2, (100,))
        stretched = torch.cat([features * torch.tensor([1e3, 1e-3, 1.0, 7.0]) - 5, torch.full((100, 1), 0.3)], dim=1)
        first, second = (LinearProbe(x, labels, 2, weight_decay=0.1) for x in (features, stretched))
        torch.testing.assert_close(first.weight, second.weight[:4], atol=1e-3, rtol=1e-3)
        assert (first(features) == second(stretched)).all()

    def test_what_is_separable_is_separated(self):
        labels = torch.arange(60) % 3
        features = torch.nn.functional.one_hot(labels, 3) + 0.05 * torch.randn(60, 3)
        held_out = torch.arange(60) >= 50
        fitted, weight_decay, share = fit_linear_probe(features, labels, 3, held_out, (1e-4, 1e-2))
        assert share == 1.0 and (fitted(features) == labels).all()
        assert weight_decay == 1e-2  # of equally good ones the largest

    def test_the_weight_decay_is_that_which_does_better_on_what_is_held_out(self):
        features, labels = torch.randn(60, 40), torch.randint(0, 2, (60,))
        features[:, 0] += 3.0 * labels
        held_out = torch.arange(60) % 3 == 0
        _, chosen, share = fit_linear_probe(features, labels, 2, held_out, (1e-6, 1e3))
        shares = {}
        for decay in (1e-6, 1e3):
            fitted = LinearProbe(features[~held_out], labels[~held_out], 2, weight_decay=decay)
            shares[decay] = (fitted(features[held_out]) == labels[held_out]).float().mean().item()
        assert share == pytest.approx(max(shares.values())) and shares[chosen] == pytest.approx(share)


def test_attentive_pooling_finds_the_one_token_that_matters():
    """The class stands in a single token among many that say nothing; their mean hardly shows it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(400, 16, 8, generator=generator)
    labels = torch.randint(0, 2, (400,), generator=generator)
    place = torch.randint(0, 16, (400,), generator=generator)
    tokens[torch.arange(400), place] = 0
    tokens[torch.arange(400), place, 0] = 12.0
    tokens[torch.arange(400), place, 1] = 12.0 * (2 * labels - 1).float()
    options = {"num_steps": 400, "batch_size": 64, "seed": 0}
    heads = train_attentive_heads(lambda rows: {3: tokens[rows]}, {3: 8}, labels[:300], 2, **options)
    right = (heads[3](tokens[300:]).argmax(1) == labels[300:]).float().mean()
    assert right > 0.9


def test_attentive_heads_of_several_layers_do_not_disturb_each_other():
    tokens, labels = torch.randn(40, 5, 8), torch.randint(0, 3, (40,))
    options = {"num_steps": 4, "batch_size": 16, "seed": 1}
    both = train_attentive_heads(lambda rows: {0: tokens[rows], 1: 2 * tokens[rows]}, {0: 8, 1: 8}, labels, 3, **options)
    alone = train_attentive_heads(lambda rows: {0: tokens[rows]}, {0: 8}, labels, 3, **options)
    torch.testing.assert_close(both[0](tokens), alone[0](tokens))
