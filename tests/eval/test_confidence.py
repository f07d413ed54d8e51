import numpy as np
import pytest

from genvision.eval.confidence import FrechetConfidence, frechet_confidence, jackknife_error, mean_interval
from genvision.eval.moments import Gaussian, Moments, fid_bias, frechet_distance, merged

SPECTRUM = np.arange(1, 13) ** -0.5
REFERENCE = Gaussian(np.zeros(12), np.diag(SPECTRUM**2))
BIAS = fid_bias(REFERENCE.sigma)


def blocks_of(features: np.ndarray, rng: np.random.Generator, num_blocks: int = 10) -> list[Moments]:
    where = rng.integers(0, num_blocks, len(features))
    blocks = [Moments(features.shape[1]) for _ in range(num_blocks)]
    for i, block in enumerate(blocks):
        block.update(features[where == i])
    return blocks


def repeated(count: int, shift: float, repeats: int = 200) -> list[FrechetConfidence]:
    """The same experiment many times: sets of `count` images whose mean is off by `shift`, so that the true distance is shift^2."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(repeats):
        features = rng.standard_normal((count, 12)) * SPECTRUM
        features[:, 0] += shift
        found.append(frechet_confidence(blocks_of(features, rng), REFERENCE, extrapolate=True))
    return found


@pytest.fixture(scope="module")
def runs() -> list[FrechetConfidence]:
    return repeated(600, 0.4)


def test_intervals_hold_the_expected_distance_about_95_times_in_100(runs):
    expected = np.mean([run.distance for run in runs])
    covered = np.mean([run.interval[0] <= expected <= run.interval[1] for run in runs])
    assert 0.89 <= covered <= 0.99


def test_the_extrapolation_is_nearer_to_the_truth_and_its_interval_holds_it(runs):
    assert np.mean([run.distance for run in runs]) > 0.16 + 0.6 * BIAS / 600
    assert abs(np.mean([run.infinity for run in runs]) - 0.16) < 0.3 * BIAS / 600
    covered = np.mean([run.infinity_interval[0] <= 0.16 <= run.infinity_interval[1] for run in runs])
    assert 0.88 <= covered <= 0.99


def test_the_bias_can_be_taken_away(runs):
    assert np.mean([run.distance - run.bias for run in runs]) == pytest.approx(0.16, abs=0.3 * BIAS / 600)


def test_the_curve_falls_towards_the_whole_set(runs):
    counts, values = zip(*runs[0].curve, strict=True)
    assert counts == (60, 120, 300, 600)
    assert sorted(values, reverse=True) == list(values)
    assert values[-1] == runs[0].distance


def test_the_distance_is_that_of_all_blocks_together():
    rng = np.random.default_rng(0)
    blocks = blocks_of(rng.standard_normal((80, 12)), rng)
    found = frechet_confidence(blocks, REFERENCE)
    assert found.distance == frechet_distance(merged(blocks), REFERENCE)
    assert found.bias == pytest.approx(BIAS / 80)
    assert found.infinity is None and found.curve == []


def test_small_sets_get_no_extrapolation_and_tiny_ones_no_interval():
    rng = np.random.default_rng(0)
    small = frechet_confidence(blocks_of(rng.standard_normal((50, 12)), rng), REFERENCE, extrapolate=True)
    assert small.interval is not None and small.infinity is None
    tiny = frechet_confidence(blocks_of(rng.standard_normal((3, 12)), rng), REFERENCE, extrapolate=True)
    assert tiny.interval is tiny.infinity is None
    assert tiny.distance > 0


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).standard_normal(50)
    left_out = (values.sum() - values) / 49
    assert jackknife_error(values.mean(), left_out, np.ones(50)) == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_intervals_of_a_fraction_hold_it_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        low, high = mean_interval(rng.random(400) < 0.8, rng.integers(0, 10, 400))
        covered.append(low <= 0.8 <= high)
    assert 0.9 <= np.mean(covered) <= 0.99
    assert mean_interval(np.ones(3), np.arange(3)) is None
    low, high = mean_interval(rng.random(60) < 0.97, np.arange(60) % 10)
    assert low < high <= 1
