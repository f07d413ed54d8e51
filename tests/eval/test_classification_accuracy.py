"""A classifier taught by generated images: high where they are real digits, chance where they show or say nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.accuracy import match_classes, wilson_interval
from genvision.eval.classification_accuracy import CASResult, classification_accuracy_score, format_cas
from genvision.eval.classifier import ClassifierConfig, build_classifier
from genvision.eval.report import to_json
from genvision.eval.result import validate
from genvision.eval.sets import ArraySource

QUICK = ClassifierConfig(architecture="resnet20", num_steps=60, batch_size=64, learning_rate=0.4, flip=False, crop="center")
FEW = dataclasses.replace(QUICK, num_steps=4, batch_size=16)
DIGITS = [str(digit) for digit in range(10)]


def score(generated, real="digits:second", config=QUICK, **options) -> CASResult:
    sources = [open_source(source) if isinstance(source, str) else source for source in (generated, real)]
    return classification_accuracy_score(*sources, config=config, **options)


@pytest.fixture(scope="module")
def few_real(digits_second) -> ArraySource:
    """Where the score itself does not matter, a few images are enough."""
    images, labels = digits_second
    return ArraySource(images[:150], labels[:150])


@pytest.fixture(scope="module")
def real_digits() -> CASResult:
    return score("digits:first")


def test_real_digits_teach_to_recognise_real_digits(real_digits):
    assert real_digits.top1 > 0.85 and real_digits.top5 > 0.97
    low, high = real_digits.top1_interval
    assert low < real_digits.top1 < high and high - low < 0.06
    assert (real_digits.num_generated, real_digits.num_real, real_digits.num_classes) == (898, 899, 10)
    assert real_digits.stem == "3x3, no pooling" and real_digits.warnings == []


def test_the_table_of_classes_adds_up_to_the_whole(real_digits):
    rows = real_digits.per_class
    assert [row["name"] for row in rows] == DIGITS
    assert sum(row["num"] for row in rows) == 899 and sum(row["num_generated"] for row in rows) == 898
    assert sum(row["num"] * row["accuracy"] for row in rows) / 899 == pytest.approx(real_digits.top1)
    for row in rows:
        assert row["name"] not in row["taken_for"]
        assert row["accuracy"] + sum(row["taken_for"].values()) <= 1 + 1e-9
    worst = min(rows, key=lambda row: row["accuracy"])
    assert worst["taken_for"], "the worst class says what it was taken for"
    assert list(worst["taken_for"].values()) == sorted(worst["taken_for"].values(), reverse=True)


def test_the_result_is_json_of_its_schema_and_a_table(real_digits):
    content = json.loads(to_json(real_digits))
    validate(content, "cas", CASResult)
    assert content["schema"] == "genvision.cas/1"
    table = format_cas(real_digits)
    worst = min(real_digits.per_class, key=lambda row: row["accuracy"])
    assert f"{worst['accuracy']:.1%}" in table and next(iter(worst["taken_for"])) in table


def test_noise_teaches_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    result = score(ArraySource(noise, np.arange(600) % 10))
    assert result.top1 < 0.25


def test_wrong_labels_teach_nothing(digits_first):
    images, labels = digits_first
    result = score(ArraySource(images, np.random.default_rng(0).permutation(labels)))
    assert result.top1 < 0.3


def test_equal_seeds_give_equal_results_and_the_global_state_is_left_alone(few_real):
    config = dataclasses.replace(FEW, crop="random", flip=True)
    before = torch.get_rng_state()
    first, second, other = (score("digits:first", few_real, config=dataclasses.replace(config, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
    assert other.training_loss != first.training_loss


def test_the_number_of_workers_changes_nothing(few_real):
    alone, helped = (score("digits:first", few_real, config=FEW, num_workers=num) for num in (0, 1))
    assert dataclasses.replace(alone, seconds=0) == dataclasses.replace(helped, seconds=0)


def test_the_baseline_is_trained_alike_and_the_gap_is_stated(digits_first, few_real):
    images, labels = digits_first
    result = score(ArraySource(images[:100], labels[:100]), few_real, baseline=open_source("digits:first"), config=FEW)
    alone = score("digits:first", few_real, config=FEW)
    assert result.baseline_top1 == alone.top1
    assert result.gap == pytest.approx(result.baseline_top1 - result.top1)
    assert [row["baseline_accuracy"] for row in result.per_class] == [row["accuracy"] for row in alone.per_class]
    assert result.num_baseline == 898 and result.baseline_hash == alone.generated_hash


def test_classes_are_matched_by_name_whatever_their_order(digits_first, few_real):
    images, labels = digits_first
    turned = ArraySource(images, 9 - labels)
    turned.label_names = DIGITS[::-1]
    ours, plain = score(turned, few_real, config=FEW), score("digits:first", few_real, config=FEW)
    assert ours.top1 == plain.top1
    assert [row["num_generated"] for row in ours.per_class] == np.bincount(labels).tolist()


def test_what_makes_a_score_meaningless_is_said(digits_first, few_real):
    images, labels = digits_first
    same = score(few_real, few_real, baseline=few_real, config=dataclasses.replace(FEW, num_steps=2))
    assert any("the generated images are the real ones" in line for line in same.warnings)
    assert any("the baseline is trained on the real images" in line for line in same.warnings)
    assert any("do not even show every generated image once" in line for line in same.warnings)
    few = ArraySource(images[labels != 3], labels[labels != 3])
    assert any("1 classes have no generated images ('3'" in line for line in score(few, few_real, config=FEW).warnings)


def test_fewer_than_ten_classes_have_no_top5(digits_first, digits_second):
    sets = []
    for images, labels in (digits_first, digits_second):
        chosen = labels < 3
        sets.append(ArraySource(images[chosen], labels[chosen]))
    result = score(*sets, config=FEW)
    assert result.top5 is None and result.top5_interval is None and result.num_classes == 3


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["a", "b", "c"], ["a", "b"], "has 3 classes, the real set has 2 .'c' is only in the generated set"),
        (["a", "b"], ["a", "b", "d"], "'d' is only in the real set"),
        (["a", "b", "x"], ["b", "a", "c"], "share the class 'a' at different places, but 'x' is only in the generated set"),
        (["a"], ["a", "b"], "the generated set has 1 class"),
        (["a", "a"], ["a", "b"], "two classes called 'a'"),
    ],
)
def test_classes_that_do_not_match_are_refused_by_name(names, wanted, message):
    with pytest.raises(UserError, match=message):
        match_classes(names, wanted)


def test_equal_numbers_of_classes_are_matched_by_place_with_a_warning():
    translation, warning = match_classes(["0", "1", "2"], ["zero", "one", "two"])
    assert translation.tolist() == [0, 1, 2]
    assert warning is not None and "matched by place" in warning and "'0' and 'zero'" in warning
    assert match_classes(["10", "2"], ["2", "10"])[0].tolist() == [1, 0]


def test_wilson_intervals_of_known_cases():
    # Newcombe (1998), table I, method 3
    for (successes, total), expected in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}.items():
        assert wilson_interval(successes, total) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((1 - wilson_interval(0, 29)[1], 1))


@pytest.mark.parametrize(("architecture", "parameters"), [("resnet20", 0.27e6), ("resnet18", 11.17e6), ("resnet50", 23.52e6)])
def test_classifiers_have_the_published_sizes_and_keep_small_images_large(architecture, parameters):
    network = build_classifier(architecture, 10, 32, seed=0).eval()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.01)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    if architecture == "resnet18":
        seen = []
        network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        network(torch.zeros(1, 3, 32, 32))
        large = build_classifier(architecture, 10, 128, seed=0).eval()
        large.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        large(torch.zeros(1, 3, 128, 128))
        assert [shape[-1] for shape in seen] == [32, 32]


def test_a_training_that_diverges_is_refused(few_real):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+; lower --learning-rate"):
        score("digits:first", few_real, config=dataclasses.replace(FEW, learning_rate=1e30))


@pytest.mark.parametrize(
    "wrong",
    [{"architecture": "vgg"}, {"batch_size": 1}, {"num_steps": 0}, {"learning_rate": 0.0}, {"label_smoothing": 1.0}, {"seed": -1}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ClassifierConfig(**wrong)
