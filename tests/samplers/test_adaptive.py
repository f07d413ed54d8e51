import pytest
import torch

from genvision.errors import UserError
from genvision.samplers.adaptive import dopri5

X = torch.ones(2, 3, dtype=torch.float64)


def decay(rates):
    """dx / dt = -rate sin(6 t) x, of which x(t) = x(0) exp(rate (cos(6 t) - 1) / 6)."""
    return lambda x, t, images: -rates[images].view(-1, 1) * (6 * t).sin().view(-1, 1) * x


def test_the_error_follows_the_tolerance():
    rates = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)
    right = x * torch.exp(rates * (torch.cos(torch.tensor(6.0, dtype=torch.float64)) - 1) / 6).view(-1, 1)
    for rtol in (1e-4, 1e-6, 1e-8):
        reached = dopri5(decay(rates), x, 0.0, 1.0, rtol=rtol, atol=1e-12)
        assert rtol / 100 < ((reached - right) / right).abs().max() < 10 * rtol
    back = dopri5(decay(rates), right, 1.0, 0.0, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_each_image_takes_its_own_steps():
    rates, counts = torch.tensor([0.1, 40.0], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)

    def counted(x, t, images):
        counts[images] += 1
        return decay(rates)(x, t, images)

    together = dopri5(counted, torch.ones(2, 1, dtype=torch.float64), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    easy, hard = counts.tolist()
    assert (easy - 2) % 6 == (hard - 2) % 6 == 0 and hard > 2 * easy
    for i in range(2):
        alone = dopri5(decay(rates[i : i + 1]), torch.ones(1, 1, dtype=torch.float64), 0.0, 1.0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone[0], together[i], atol=1e-12, rtol=0)


def test_a_velocity_that_is_no_number_ends_in_a_message():
    with pytest.raises(UserError, match="dopri5 gets nowhere at t = "):
        dopri5(lambda x, t, images: x / (t.view(-1, 1) - 0.5).clamp(min=0), X, 1.0, 0.0, rtol=1e-3, atol=1e-6)
