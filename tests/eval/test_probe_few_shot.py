"""Probes that are told few labels, and the probe trained by MAGE's recipe, on a tiny trained generator."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.probe import ProbeResult, probe
from genvision.eval.probe_config import ProbeConfig
from genvision.eval.probe_images import choose_labels
from genvision.eval.probe_report import format_probe, probe_chart
from genvision.pipeline import ImagePipeline

QUICK = ProbeConfig(layers=(1,), k=3, weight_decays=(0.1,))


@pytest.fixture(scope="module")
def pipeline(tiny_flow) -> ImagePipeline:
    return ImagePipeline.from_pretrained(tiny_flow)


def run(pipeline, **options) -> ProbeResult:
    sets = (open_source("digits:first"), open_source("digits:second"))
    config = dataclasses.replace(QUICK, **options)
    return probe(pipeline.generator, pipeline.tokenizer, *sets, config=config, num_test=200)


def source(labels: list[int]) -> SimpleNamespace:
    return SimpleNamespace(labels=np.array(labels), label_names=["a", "b", "c"], spec="some")


def test_a_part_of_each_class_is_told_and_at_least_one_image():
    labelled = source([0] * 100 + [1] * 10 + [2] * 40)
    indices = choose_labels(labelled, np.arange(150), dataclasses.replace(QUICK, label_fraction=0.05))
    assert np.bincount(labelled.labels[indices]).tolist() == [5, 1, 2]
    assert (np.diff(indices) > 0).all()
    other = choose_labels(labelled, np.arange(150), dataclasses.replace(QUICK, label_fraction=0.05, seed=1))
    assert indices.tolist() != other.tolist()
    all_of_them = choose_labels(labelled, np.arange(20, 150), dataclasses.replace(QUICK, label_fraction=1.0))
    assert all_of_them.tolist() == list(range(20, 150))


def test_so_many_of_each_class_or_a_refusal_that_names_the_class():
    labelled = source([0, 1, 2] * 4 + [0])
    indices = choose_labels(labelled, np.arange(13), dataclasses.replace(QUICK, labels_per_class=4))
    assert np.bincount(labelled.labels[indices]).tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="5 labels of each class are wanted, class 'b' has 4 images"):
        choose_labels(labelled, np.arange(13), dataclasses.replace(QUICK, labels_per_class=5))


def test_few_labels_tell_less_and_the_result_says_how_few(pipeline):
    few = run(pipeline, label_fraction=0.05)
    assert (few.num_train, few.num_labels, few.num_held_out, few.label_fraction) == (898, 44, 4, 0.05)
    assert 0.2 < few.top1 < run(pipeline).top1
    low, high = few.top1_interval
    assert low < few.top1 < high
    assert any("labels of 44 of 898 training images were used" in note for note in few.notes)
    assert any("4 images chose layer and probe" in note for note in few.notes)
    assert "labels of 44 of 898 training" in probe_chart(few)


def test_mages_probe_stands_beside_the_others_and_warns_where_it_cannot_move(pipeline):
    result = run(pipeline, probes=("linear", "mage"), mage_learning_rate=25.0, mage_epochs=30, mage_batch_size=128)
    linear, mage = result.rows
    assert (linear["probe"], mage["probe"]) == ("linear", "mage") and linear["training_loss"] is None
    assert mage["top1"] > linear["top1"] - 0.1 and 0 < mage["training_loss"] < 1.5
    assert {row["probe"] for row in result.baselines} == {"linear", "mage"}
    assert (result.mage_epochs, result.mage_batch_size, result.mage_learning_rate) == (30, 128, 25.0)
    assert not any("mage" in line for line in result.warnings) and any("one centre crop" in note for note in result.notes)
    assert "mean, mage" in format_probe(result)
    still = run(pipeline, probes=("mage",), mage_epochs=1)
    assert any("hardly move the weights" in line and "--mage-lr" in line for line in still.warnings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probes": ("svm",)}, "probe 'svm' is unknown; choose from knn, linear, mage"),
        ({"label_fraction": 0.0}, "label_fraction must be above 0 and at most 1, got 0"),
        ({"labels_per_class": 0}, "labels_per_class must be at least 1, got 0"),
        ({"label_fraction": 0.1, "labels_per_class": 2}, "both given"),
        ({"mage_epochs": 0}, "mage_epochs must be at least 1"),
        ({"mage_batch_size": 1}, "mage_batch_size must be at least 2"),
        ({"mage_learning_rate": 0.0}, "mage_learning_rate must be above 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        ProbeConfig(**wrong)


def test_labels_too_few_for_neighbours_are_refused_and_enough_without_them(pipeline):
    with pytest.raises(UserError, match=r"10 training images are too few for k = 20 .* leave out knn"):
        run(pipeline, labels_per_class=1, k=20)
    assert run(pipeline, labels_per_class=1, k=20, probes=("linear",)).num_labels == 10
