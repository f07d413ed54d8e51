"""Crops are ADM's and torchvision's, to the bit."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import TenCrop

from genvision.data.transforms import CropConfig, ViewConfig, center_crop, flip, random_crop, ten_crop
from genvision.errors import UserError
from parity_fixtures import Fixture


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "name"), [(48, "img0"), (48, "img1"), (64, "img0"), (64, "img1"), (64, "img2")])
def test_center_crop_equals_adm(size, name):
    fixture = Fixture("eval_preprocess")
    image = Image.fromarray(fixture.inputs[name].numpy())
    np.testing.assert_array_equal(np.asarray(center_crop(image, size)), fixture.outputs[f"adm_center_crop{size}/{name}"].numpy())


def test_center_crop_of_an_image_of_the_right_size_changes_nothing():
    image = noise_image(16, 16)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 16)), np.asarray(image))


@pytest.mark.parametrize("shape", [(1, 40), (33, 7), (100, 100)])
def test_any_shape_becomes_the_square(shape):
    image = noise_image(*shape)
    assert center_crop(image, 12).size == (12, 12)
    assert random_crop(image, 12, np.random.default_rng(0)).size == (12, 12)
    assert {view.size for view in ten_crop(image, 12)} == {(12, 12)}


def test_random_crop_repeats_with_the_same_numbers_and_differs_with_others():
    image = noise_image(50, 40)
    crops = [np.asarray(random_crop(image, 16, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()


def test_random_crop_draws_every_enlargement_and_every_place():
    class Recorder:
        def __init__(self):
            self.rng, self.bounds = np.random.default_rng(0), []

        def integers(self, *bounds):
            value = self.rng.integers(*bounds)
            self.bounds.append((bounds, int(value)))
            return value

    rng, image = Recorder(), noise_image(64, 64)
    for _ in range(200):
        assert random_crop(image, 16, rng).size == (16, 16)
    enlarged = [value for (bounds, value) in rng.bounds if bounds == (16, 21)]
    assert set(enlarged) == {16, 17, 18, 19, 20}
    assert {value for (bounds, value) in rng.bounds if bounds == (5,)} == {0, 1, 2, 3, 4}


def test_ten_crop_equals_torchvision_on_the_larger_center_crop():
    image = noise_image(60, 50)
    for size, enlarge in ((20, 1.1), (20, 1.25), (16, 1.0)):
        ours = ten_crop(image, size, enlarge)
        theirs = TenCrop(size)(center_crop(image, int(size * enlarge)))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_views_are_counted_and_ordered():
    image = noise_image(20, 30)
    assert ViewConfig().num_views == 1
    both = ViewConfig(flip=True).apply(image, 8)
    assert len(both) == ViewConfig(flip=True).num_views == 2
    np.testing.assert_array_equal(np.asarray(both[1]), np.asarray(both[0])[:, ::-1])
    np.testing.assert_array_equal(np.asarray(flip(both[0])), np.asarray(both[1]))
    ten = ViewConfig(crops="ten", flip=True)
    assert len(ten.apply(image, 8)) == ten.num_views == 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CropConfig(crop="middle"), "middle.*center, random"),
        (lambda: CropConfig(enlarge_range=(0.5, 1.0)), "enlarge_range"),
        (lambda: ViewConfig(crops="ten"), "flip"),
        (lambda: ViewConfig(crops="nine"), "nine.*center, ten"),
        (lambda: ViewConfig(enlarge=0.9), "enlarge"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
