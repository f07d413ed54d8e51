import numpy as np
import pytest

from genvision.errors import UserError
from genvision.eval import kernel_distance as module
from genvision.eval.kernel_distance import kernel_distance, kid_interval, mmd2
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def activations() -> Fixture:
    return Fixture("eval_activations")


@pytest.fixture(scope="module")
def sets(activations) -> tuple[np.ndarray, np.ndarray]:
    return activations.inputs["gen"].numpy(), activations.inputs["ref"].numpy()


def test_subsets_and_values_equal_torch_fidelity(activations, sets):
    found = kernel_distance(*sets, num_subsets=10, subset_size=100)
    np.testing.assert_allclose(found.per_subset, activations.outputs["fidelity/kid_poly_per_subset"], atol=1e-6)
    assert found.mean == pytest.approx(activations.outputs["fidelity/kid_poly_mean"].item(), abs=1e-6)
    assert found.std == pytest.approx(activations.outputs["fidelity/kid_poly_std"].item(), abs=1e-6)
    assert (found.num_subsets, found.subset_size, found.seed) == (10, 100, 2020)


def test_the_gaussian_kernel_equals_torch_fidelity(activations, sets):
    found = kernel_distance(*sets, kernel="rbf", num_subsets=10, subset_size=100)
    assert found.mean == pytest.approx(activations.outputs["fidelity/kid_rbf_mean"].item(), abs=1e-6)
    assert found.std == pytest.approx(activations.outputs["fidelity/kid_rbf_std"].item(), abs=1e-6)


def test_the_other_order_of_drawing_equals_clean_fid(activations, sets):
    found = kernel_distance(*sets, variant="clean", num_subsets=10, subset_size=100)
    assert found.mean == pytest.approx(activations.outputs["cleanfid/kid_seed0_sub10x100"].item(), abs=1e-6)


def test_the_estimator_of_whole_sets_is_the_unbiased_one(activations, sets):
    expected = activations.outputs["fidelity/mmd2_gen300_ref300_unbiased"].item()
    assert mmd2(sets[0][:300], sets[1][:300]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
def test_tiles_do_not_matter(monkeypatch, sets, kernel):
    whole = mmd2(*sets, kernel)
    monkeypatch.setattr(module, "TILE", 70)
    assert mmd2(*sets, kernel) == pytest.approx(whole, rel=1e-10)


def test_subsets_are_no_larger_than_the_sets(sets):
    assert kernel_distance(sets[0][:50], sets[1]).subset_size == 50


def test_equal_distributions_are_at_zero_and_the_interval_holds_it_about_95_times_in_100():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((300, 6))
    values, covered = [], []
    for _ in range(150):
        generated = rng.standard_normal((200, 6)) + 0.1
        values.append(mmd2(generated, reference))
        covered.append(kid_interval(generated, reference, rng.integers(0, 10, 200)))
    expected = np.mean(values)
    assert 0.89 <= np.mean([low <= expected <= high for low, high in covered]) <= 0.99
    same = [mmd2(rng.standard_normal((200, 6)), rng.standard_normal((200, 6))) for _ in range(100)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 10


def test_the_interval_is_around_the_estimator_of_whole_sets(sets):
    low, high = kid_interval(*sets, np.arange(300) % 10)
    assert (low + high) / 2 == pytest.approx(mmd2(*sets), rel=1e-9)
    assert kid_interval(sets[0], sets[1], np.zeros(300, dtype=np.int64)) is None


def test_too_few_images_and_other_features_are_refused():
    with pytest.raises(UserError, match="at least 2 generated images, got 1"):
        kernel_distance(np.zeros((1, 2)), np.zeros((9, 2)))
    with pytest.raises(UserError, match="features of 2 and 3 numbers"):
        kernel_distance(np.zeros((9, 2)), np.zeros((9, 3)))
