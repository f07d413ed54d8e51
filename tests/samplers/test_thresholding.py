import pytest
import torch

from genvision.samplers.thresholding import dynamic_threshold
from parity_fixtures import Fixture


@pytest.mark.parametrize(("ratio", "maximum"), [(0.95, 1.5), (0.995, 1.0), (0.995, 100.0), (0.9, 100.0)])
def test_dynamic_thresholding_equals_diffusers(ratio, maximum):
    fixture = Fixture("dynamic_threshold")
    kept = dynamic_threshold(fixture.inputs["x0"], ratio, maximum)
    torch.testing.assert_close(kept, fixture.outputs[f"ratio_{ratio}_max_{maximum}"], atol=fixture.atol, rtol=0)


def test_a_maximum_of_1_is_plain_clipping_and_images_in_range_are_left_alone():
    x = torch.linspace(-3, 3, 24).view(1, 3, 2, 4)
    assert torch.equal(dynamic_threshold(x, 0.5, 1.0), x.clamp(-1, 1))
    assert torch.equal(dynamic_threshold(x / 3, 1.0, 5.0), x / 3)
