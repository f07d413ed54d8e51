import numpy as np
import pytest
import torch

from genvision.errors import UserError
from genvision.eval.metrics import Moments, frechet_distance, inception_score, psnr, ssim
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def activations() -> Fixture:
    return Fixture("eval_activations")


def moments_of(*batches: torch.Tensor | np.ndarray) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def test_statistics_and_fid_equal_those_of_adm_and_torch_fidelity(activations):
    gen, ref = activations.inputs["gen"], activations.inputs["ref"]
    np.testing.assert_allclose(moments_of(gen).mu, activations.outputs["adm/mu_gen"], atol=1e-6)
    np.testing.assert_allclose(moments_of(ref).sigma, activations.outputs["adm/sigma_ref"], atol=1e-12)
    for suite in ("adm", "fidelity"):
        for name, a in (("fid", gen), ("fid_gen40_vs_ref", gen[:40]), ("fid_ref_vs_ref", ref)):
            expected = activations.outputs[f"{suite}/{name}"].item()
            assert frechet_distance(moments_of(a), moments_of(ref)) == pytest.approx(expected, rel=1e-6, abs=1e-9), f"{suite}/{name}"


@pytest.mark.parametrize(("splits", "seed"), [(1, None), (10, None), (10, 2020), (7, 2020)])
def test_inception_score_equals_torch_fidelity(activations, splits, seed):
    score = inception_score(activations.inputs["logits"], splits, seed)
    suffix = f"splits{splits}_shuffle{int(seed is not None)}"
    assert score.mean == pytest.approx(activations.outputs[f"fidelity/isc_mean_{suffix}"].item(), rel=1e-9)
    assert score.std == pytest.approx(activations.outputs[f"fidelity/isc_std_{suffix}"].item(), rel=1e-9)


def test_inception_score_equals_the_original_formula():
    fixture = Fixture("inception_score")
    for splits in (1, 10):
        score = inception_score(fixture.inputs["probs"].log(), splits, shuffle_seed=None)
        np.testing.assert_allclose([score.mean, score.std], fixture.outputs[f"mean_std_splits_{splits}"], atol=fixture.atol)
    confident = 100 * torch.eye(7).repeat(3, 1)
    assert inception_score(confident, 1).mean == pytest.approx(fixture.outputs["uniform_onehot"].item())


def test_inception_score_of_a_collapsed_set_is_one():
    assert inception_score(torch.randn(1, 10).repeat(40, 1)).mean == pytest.approx(1.0)


def test_fid_of_a_set_with_itself_is_zero_and_with_a_collapsed_one_is_large():
    features = torch.randn(200, 8)
    assert abs(frechet_distance(moments_of(features), moments_of(features))) < 1e-9
    assert frechet_distance(moments_of(features), moments_of(features[:1].repeat(200, 1))) > 5


def test_order_batches_and_shards_do_not_matter():
    features = 3 + torch.randn(150, 6)
    whole = moments_of(features)
    shuffled = moments_of(features[torch.randperm(150)])
    batched = moments_of(*features.split(7))
    merged = moments_of(features[:40])
    merged.merge(moments_of(*features[40:].split(64)))
    merged.merge(Moments(6))
    started_empty = Moments(6)
    started_empty.merge(whole)
    for other in (shuffled, batched, merged, started_empty):
        assert other.count == 150
        np.testing.assert_allclose(other.mu, whole.mu, rtol=1e-12)
        np.testing.assert_allclose(other.sigma, whole.sigma, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(whole.sigma, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-13)


def test_covariance_survives_a_large_mean():
    features = torch.randn(500, 3, dtype=torch.float64)
    np.testing.assert_allclose(moments_of(*(features + 1e7).split(50)).sigma, moments_of(features).sigma, rtol=1e-6, atol=1e-7)


def test_moments_travel_as_plain_arrays(tmp_path):
    moments = moments_of(torch.randn(20, 4))
    np.savez(tmp_path / "moments.npz", **moments.to_dict())
    with np.load(tmp_path / "moments.npz") as content:
        back = Moments.from_dict(content)
    assert back.count == 20
    np.testing.assert_array_equal(back.sigma, moments.sigma)


def test_unusable_features_are_refused_in_one_line():
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(moments_of(torch.randn(1, 4)), moments_of(torch.randn(9, 4)))
    with pytest.raises(UserError, match="4 and 5 features"):
        frechet_distance(moments_of(torch.randn(9, 4)), moments_of(torch.randn(9, 5)))
    with pytest.raises(UserError, match="not finite"):
        moments_of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        inception_score(torch.randn(9, 4))


def random_pair(height: int = 9, width: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    return a, np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)


def test_psnr_of_known_errors():
    a = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    b = a.copy()
    b[1] += 10
    values = psnr(a, b)
    assert np.isinf(values[0])
    assert values[1] == pytest.approx(20 * np.log10(25.5))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_the_definition_written_as_loops(data_range):
    a, b = random_pair()
    x, y = a / 255.0, b / 255.0
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for n, value in enumerate(ssim(a, b, data_range)):
        local = []
        for top in range(9 - 6):
            for left in range(11 - 6):
                for channel in range(3):
                    p = x[n, top : top + 7, left : left + 7, channel].ravel()
                    q = y[n, top : top + 7, left : left + 7, channel].ravel()
                    cov = np.cov(p, q)
                    top_part = (2 * p.mean() * q.mean() + c1) * (2 * cov[0, 1] + c2)
                    local.append(top_part / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
        assert value == pytest.approx(np.mean(local), abs=1e-12)


def test_ssim_of_equal_images_is_one_and_the_wider_range_is_kinder():
    a, b = random_pair()
    np.testing.assert_allclose(ssim(a, a), 1.0)
    assert (ssim(a, b) < ssim(a, b, data_range=2.0)).all()


def test_pairs_that_cannot_be_compared_are_refused():
    a, b = random_pair()
    with pytest.raises(UserError, match="of one shape"):
        psnr(a, b[:, 1:])
    with pytest.raises(UserError, match="uint8"):
        ssim(a / 255.0, b / 255.0)
    with pytest.raises(UserError, match="at least 7x7"):
        ssim(a[:, :6], b[:, :6])
