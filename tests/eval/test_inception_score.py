import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from genvision.errors import UserError
from genvision.eval.inception_score import inception_score
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def activations() -> Fixture:
    return Fixture("eval_activations")


@pytest.mark.parametrize("block", [5000, 100, 128])
def test_adms_blocks_equal_the_tensorflow_evaluator(activations, block):
    score = inception_score(activations.inputs["logits"], "adm", block_size=block)
    assert score.mean == pytest.approx(activations.outputs[f"adm/is_split{block}"].item(), rel=1e-5)
    assert score.num_splits == -(-300 // block)


@pytest.mark.parametrize("splits", [10, 7])
def test_shuffled_splits_equal_torch_fidelity(activations, splits):
    score = inception_score(activations.inputs["logits"], "torch-fidelity", num_splits=splits)
    assert score.mean == pytest.approx(activations.outputs[f"fidelity/isc_mean_splits{splits}_shuffle1"].item(), rel=1e-9)
    assert score.std == pytest.approx(activations.outputs[f"fidelity/isc_std_splits{splits}_shuffle1"].item(), rel=1e-9)


def test_other_counts_equal_torch_fidelity_too():
    logits = torch.randn(103, 17) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    ours = inception_score(logits.numpy())
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_contiguous_splits_equal_the_first_definition(activations):
    score = inception_score(activations.inputs["logits"], "first-is")
    assert score.mean == pytest.approx(activations.outputs["fidelity/isc_mean_splits10_shuffle0"].item(), rel=1e-9)
    fixture = Fixture("inception_score")
    for splits in (1, 10):
        score = inception_score(fixture.inputs["probs"].log(), "first-is", num_splits=splits)
        np.testing.assert_allclose([score.mean, score.std], fixture.outputs[f"mean_std_splits_{splits}"], atol=fixture.atol)
    confident = 100 * torch.eye(7).repeat(3, 1)
    assert inception_score(confident, "first-is", num_splits=1).mean == pytest.approx(fixture.outputs["uniform_onehot"].item())


@pytest.mark.parametrize("estimator", ["adm", "torch-fidelity", "first-is"])
def test_a_collapsed_set_scores_one_and_a_certain_one_no_nan(estimator):
    assert inception_score(torch.randn(1, 10).repeat(40, 1), estimator).mean == pytest.approx(1.0)
    certain = inception_score(1e4 * torch.eye(8).repeat(10, 1), estimator, num_splits=2, block_size=80)
    assert certain.mean == pytest.approx(8.0, rel=0.05)


def test_sorting_by_class_moves_every_estimator_but_the_shuffled_one_little():
    logits = 8 * torch.eye(20).repeat_interleave(20, dim=0) + torch.randn(400, 20)
    mixed = logits[torch.randperm(400)]
    for estimator in ("adm", "first-is"):
        assert inception_score(logits, estimator, block_size=40).mean < 0.5 * inception_score(mixed, estimator, block_size=40).mean
    assert inception_score(logits).mean == pytest.approx(inception_score(mixed).mean, rel=0.05)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        inception_score(torch.randn(9, 4))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        inception_score(torch.randn(1, 4), "adm")
