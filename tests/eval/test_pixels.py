import numpy as np
import pytest

from genvision.errors import UserError
from genvision.eval.pixels import psnr, ssim, ssims


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
    assert psnr(a[:1] * 0, a[:1] * 0 + 255)[0] == 0  # no wrap-around of bytes


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
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), rtol=1e-12)


def test_several_ranges_at_once_give_what_each_gives_alone():
    a, b = random_pair()
    np.testing.assert_array_equal(ssims(a, b, (1.0, 2.0)), [ssim(a, b), ssim(a, b, data_range=2.0)])


def test_a_pair_scores_the_same_in_every_batch():
    a, b = random_pair()
    for measure in (psnr, ssim):
        np.testing.assert_array_equal(measure(a, b), np.concatenate([measure(a[i : i + 1], b[i : i + 1]) for i in range(2)]))


def test_pairs_that_cannot_be_compared_are_refused():
    a, b = random_pair()
    with pytest.raises(UserError, match="of one shape"):
        psnr(a, b[:, 1:])
    with pytest.raises(UserError, match="of one shape"):
        psnr(a[..., :1], b[..., :1])
    with pytest.raises(UserError, match="uint8"):
        ssim(a / 255.0, b / 255.0)
    with pytest.raises(UserError, match="at least 7x7"):
        ssim(a[:, :6], b[:, :6])
