import math

import pytest
import torch

from genvision.errors import UserError
from genvision.samplers.guidance import Guidance, combine
from genvision.samplers.projected_guidance import ProjectedGuidance


def test_tokens_are_guided_from_start_up_to_stop():
    assert Guidance(scale=3.0, start=3 / 9, stop=6 / 9).scales(9) == [1, 1, 1, 3, 3, 3, 1, 1, 1]
    assert Guidance(scale=3.0, stop=0.0).scales(4) == [1] * 4
    assert Guidance(scale=5.0, schedule="linear").scales(5) == [1, 2, 3, 4, 5]
    assert Guidance(scale=2.0).scale_at(0, 1) == 2


def test_both_ends_of_an_interval_of_time_are_guided():
    progress = torch.tensor([0.0, 0.125 - 1e-6, 0.125, 0.3, 1 - 0.3, 0.7 + 1e-6, 1.0], dtype=torch.float64)
    assert Guidance(scale=6.7, start=0.125, stop=0.7).scale_over(progress).tolist() == [1, 1, 6.7, 6.7, 6.7, 1, 1]


def test_schedules_rise_from_1_over_progress():
    progress = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert Guidance(scale=3.0, schedule="linear").scale_over(progress).tolist() == [1, 1.5, 2, 3]
    cosine = [1 + (1 - math.cos(math.pi * p)) for p in progress.tolist()]
    assert Guidance(scale=3.0, schedule="cosine").scale_over(progress).tolist() == pytest.approx(cosine)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1.0},
        {"scale": float("nan")},
        {"schedule": "up"},
        {"start": -0.1},
        {"channels": 0},
        {"method": "max"},
        {"apg_eta": float("inf")},
        {"apg_norm": 0.0},
        {"apg_momentum": 1.0},
    ],
)
def test_impossible_guidance_is_refused(options):
    with pytest.raises(UserError):
        Guidance(**options)


@pytest.fixture
def pair():
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 3, 3, generator=random, dtype=torch.float64).unbind(0)


SCALES = torch.tensor([1.5, 2.0, 4.0, 9.0], dtype=torch.float64)
ALL = torch.arange(4)


def test_projected_guidance_with_everything_off_is_classifier_free_guidance(pair):
    guided = ProjectedGuidance(eta=1.0, norm=None, momentum=0.0)(*pair, SCALES, ALL, 4)
    torch.testing.assert_close(guided, combine(*pair, SCALES.view(4, 1, 1, 1)))


def test_without_the_parallel_part_the_step_is_at_right_angles_to_the_prediction(pair):
    conditional, base = pair
    step = ProjectedGuidance(eta=0.0, norm=None, momentum=0.0)(conditional, base, SCALES, ALL, 4) - conditional
    torch.testing.assert_close((step * conditional).sum((1, 2, 3)), torch.zeros(4, dtype=torch.float64))
    assert (step.flatten(1).norm(dim=1) > 1).all()


def test_the_norm_of_each_images_difference_is_limited(pair):
    conditional, base = pair
    norms = (conditional - base).flatten(1).norm(dim=1)
    limit = float(norms.sort().values[1:3].mean())  # two images lie above, two below
    step = ProjectedGuidance(eta=1.0, norm=limit, momentum=0.0)(conditional, base, torch.full((4,), 2.0), ALL, 4) - conditional
    torch.testing.assert_close(step.flatten(1).norm(dim=1), norms.clamp(max=limit))


def test_momentum_adds_up_the_differences_of_each_image(pair):
    conditional, base = pair
    guidance, two = ProjectedGuidance(eta=1.0, norm=None, momentum=-0.5), torch.full((4,), 2.0, dtype=torch.float64)
    guidance(conditional, base, two, ALL, 4)
    some = torch.tensor([3, 1])  # the others sit this call out
    step = guidance(conditional[some], base[some], two[:2], some, 4) - conditional[some]
    torch.testing.assert_close(step, 0.5 * (conditional - base)[some])
    step = guidance(conditional, base, two, ALL, 4) - conditional
    factors = torch.tensor([0.5, 0.75, 0.5, 0.75], dtype=torch.float64).view(4, 1, 1, 1)
    torch.testing.assert_close(step, factors * (conditional - base))


def test_a_power_of_progress_goes_along_a_cosine():
    """RAR's formula, told with the number of the token over the number of tokens; the first token has no null branch."""
    scales = Guidance(scale=16.0, schedule="power-cosine", power=2.75).scales(256)
    assert scales == pytest.approx([1 + 15 * (1 - math.cos(math.pi * (i / 256) ** 2.75)) / 2 for i in range(256)])
    assert scales[0] == 1
    with pytest.raises(UserError, match="power"):
        Guidance(power=0.0)


def test_titoks_linear_guidance_is_ours_at_another_scale():
    """There the scale on top of the conditional prediction is s t / T at step t, so the last step has (T - 1) / T of it."""
    ours = Guidance(scale=1 + 4.5 * 7 / 8, schedule="linear").scales(8)
    assert ours == pytest.approx([1 + 4.5 * t / 8 for t in range(8)])
