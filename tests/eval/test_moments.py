import numpy as np
import pytest
import torch

from genvision.errors import UserError
from genvision.eval.moments import Gaussian, Moments, fid_bias, frechet_distance, merged, without
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def activations() -> Fixture:
    return Fixture("eval_activations")


def moments_of(*batches: torch.Tensor | np.ndarray) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def spatial(activations: Fixture, which: str) -> torch.Tensor:
    return activations.inputs[f"spatial_{which}"][..., :7].flatten(1)


def test_fid_equals_that_of_every_suite(activations):
    gen, ref = activations.inputs["gen"], activations.inputs["ref"]
    for suite in ("adm", "fidelity"):
        for name, a in (("fid", gen), ("fid_gen40_vs_ref", gen[:40]), ("fid_ref_vs_ref", ref)):
            expected = activations.outputs[f"{suite}/{name}"].item()
            assert frechet_distance(moments_of(a), moments_of(ref)) == pytest.approx(expected, rel=1e-6, abs=1e-9), f"{suite}/{name}"
    for suite in ("cleanfid", "torchmetrics"):
        assert frechet_distance(moments_of(gen), moments_of(ref)) == pytest.approx(activations.outputs[f"{suite}/fid"].item(), rel=1e-6)


def test_statistics_and_sfid_equal_adms(activations):
    gen, ref = activations.inputs["gen"], activations.inputs["ref"]
    np.testing.assert_allclose(moments_of(gen).mu, activations.outputs["adm/mu_gen"], atol=1e-6)
    np.testing.assert_allclose(moments_of(ref).sigma, activations.outputs["adm/sigma_ref"], atol=1e-12)
    sfid = frechet_distance(moments_of(spatial(activations, "gen")), moments_of(spatial(activations, "ref")))
    assert sfid == pytest.approx(activations.outputs["adm/sfid"].item(), rel=1e-6)


def test_rfid_equals_the_evaluator_of_titok(activations):
    gen, ref = activations.inputs["gen"][:300], activations.inputs["ref"][:300]
    assert frechet_distance(moments_of(gen), moments_of(ref)) == pytest.approx(
        activations.outputs["titok/rfid_gen300_ref300"].item(), rel=1e-6
    )


def exact_distance(x: np.ndarray, y: np.ndarray) -> float:
    """From the data themselves: the root term is the nuclear norm of the product of centred data."""
    x_c, y_c = ((a - a.mean(0)) / np.sqrt(len(a) - 1) for a in (x, y))
    root = np.linalg.svd(x_c @ y_c.T, compute_uv=False).sum()
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + (x_c**2).sum() + (y_c**2).sum() - 2 * root)


@pytest.mark.parametrize(("num_x", "num_y"), [(300, 500), (40, 500), (40, 30), (2, 2), (90, 128)])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_singular_covariances_lose_nothing(num_x, num_y, power):
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 129) ** -power
    x, y = rng.standard_normal((num_x, 128)) * spectrum, rng.standard_normal((num_y, 128)) * spectrum + 0.1
    x[-1] = x[0]
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(exact_distance(x, y), rel=1e-10)


def test_identical_sets_have_no_distance():
    for count in (30, 400):
        features = torch.randn(count, 256) * 3 + 1
        assert abs(frechet_distance(moments_of(features), moments_of(features))) < 1e-9


def test_a_collapsed_set_is_far_and_two_points_are_their_distance_apart():
    features = torch.randn(200, 8)
    assert frechet_distance(moments_of(features), moments_of(features[:1].repeat(200, 1))) > 5
    a, b = torch.zeros(5, 3), torch.tensor([[3.0, 0, 4]]).repeat(7, 1)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(25.0)


def test_order_batches_and_shards_do_not_matter():
    features = 3 + torch.randn(150, 6)
    whole = moments_of(features)
    shuffled = moments_of(features[torch.randperm(150)])
    batched = moments_of(*features.split(7))
    pieces = merged([moments_of(features[:40]), Moments(6), moments_of(*features[40:].split(64))])
    started_empty = Moments(6)
    started_empty.merge(whole)
    for other in (shuffled, batched, pieces, started_empty):
        assert other.count == 150
        np.testing.assert_allclose(other.mu, whole.mu, rtol=1e-12)
        np.testing.assert_allclose(other.sigma, whole.sigma, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(whole.sigma, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-13)


def test_merging_leaves_the_parts_alone():
    a, b = moments_of(torch.randn(9, 4)), moments_of(torch.randn(7, 4))
    count, scatter = a.count, a.scatter.copy()
    merged([a, b])
    assert a.count == count
    np.testing.assert_array_equal(a.scatter, scatter)


def test_a_part_can_be_taken_away_again():
    parts = [moments_of(torch.randn(count, 5) + 3) for count in (30, 1, 50)]
    rest = without(merged(parts), parts[2])
    expected = merged(parts[:2])
    assert rest.count == 31
    np.testing.assert_allclose(rest.mu, expected.mu, rtol=1e-12)
    np.testing.assert_allclose(rest.sigma, expected.sigma, rtol=1e-10, atol=1e-12)
    assert without(parts[0], parts[0]).count == 0


def test_covariance_survives_a_large_mean():
    features = torch.randn(500, 3, dtype=torch.float64)
    np.testing.assert_allclose(moments_of(*(features + 1e7).split(50)).sigma, moments_of(features).sigma, rtol=1e-6, atol=1e-7)


def test_the_bias_term_predicts_how_much_small_sets_read_too_high():
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 25) ** -0.5
    reference = Gaussian(np.zeros(24), np.diag(spectrum**2))
    for count in (400, 1600):
        seen = [frechet_distance(moments_of(rng.standard_normal((count, 24)) * spectrum), reference) for _ in range(60)]
        assert np.mean(seen) == pytest.approx(fid_bias(reference.sigma) / count, rel=0.08)
    assert fid_bias(np.zeros((3, 3))) == 0
    assert fid_bias(np.eye(2)) == pytest.approx(2 + 0.5 * (4 * 0.5 + 0.5 * 2))


def test_unusable_statistics_are_refused_in_one_line():
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(moments_of(torch.randn(1, 4)), moments_of(torch.randn(9, 4)))
    with pytest.raises(UserError, match="4 and 5 features"):
        frechet_distance(moments_of(torch.randn(9, 4)), moments_of(torch.randn(9, 5)))
    with pytest.raises(UserError, match="not finite"):
        moments_of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="not finite"):
        Gaussian(np.zeros(2), np.array([[1.0, np.nan], [np.nan, 1.0]])).check()
    with pytest.raises(UserError, match="not symmetric"):
        Gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])).check()
    with pytest.raises(UserError, match=r"mu \[D\] and sigma \[D, D\]"):
        Gaussian(np.zeros(3), np.eye(2)).check()
