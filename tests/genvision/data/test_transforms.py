"""Crops are ADM's and torchvision's, to the bit."""

import math

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, TenCrop

from genvision.data.transforms import CropConfig, ViewConfig, center_crop, flip, random_crop, resized_crop, ten_crop
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
    assert {resized_crop(image, 12, np.random.default_rng(seed)).size for seed in range(20)} == {(12, 12)}
    assert {view.size for view in ten_crop(image, 12)} == {(12, 12)}


@pytest.mark.parametrize("crop", [random_crop, resized_crop])
@pytest.mark.parametrize("side", [40, 8])
def test_a_crop_repeats_with_the_same_numbers_and_differs_with_others(crop, side):
    image = noise_image(side + 10, side)
    crops = [np.asarray(crop(image, 8, np.random.default_rng(seed))) for seed in (0, 0, 1)]
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


def cut_boxes(height: int, width: int, num: int, **options) -> np.ndarray:
    """Top, left, height and width of what `num` resized crops show of an image whose pixels are their own coordinates, int64 [num, 4]."""
    boxes = np.empty((num, 4))
    for axis, coordinates in enumerate(np.mgrid[:height, :width].astype(np.float32)):
        image = Image.fromarray(coordinates)
        for seed in range(num):
            crop = resized_crop(image, 128, np.random.default_rng(seed), **options)
            first, second = (crop.getpixel((i, i)) for i in (63, 64))  # a ramp enlarged is a ramp
            side = 128 * (second - first)
            boxes[seed, [axis, 2 + axis]] = (first + second + 1 - side) / 2, side
    assert abs(boxes - boxes.round()).max() < 0.1
    return boxes.round().astype(int)


class TestResizedCrop:
    @pytest.mark.parametrize("shape", [(60, 40), (100, 125), (8, 8)])
    @pytest.mark.parametrize("min_area", [0.2, 0.8])
    def test_areas_and_proportions_lie_within_their_bounds(self, shape, min_area):
        top, left, h, w = cut_boxes(*shape, 150, min_area=min_area).T
        height, width = shape
        assert (top >= 0).all() and (top + h <= height).all() and (left >= 0).all() and (left + w <= width).all()
        # sides are rounded to whole pixels
        assert ((w + 0.5) * (h + 0.5) >= min_area * height * width).all()
        assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()

    def test_every_area_and_every_place_comes(self):
        top, left, h, w = cut_boxes(100, 100, 600).T
        small = h * w < 5000  # such parts fit in, whatever their proportions
        counts, _ = np.histogram(h[small] * w[small] / 1e4, bins=6, range=(0.2, 0.5))
        assert counts.sum() > 200 and abs(counts - counts.mean()).max() < 4 * math.sqrt(counts.mean())
        assert (h * w).max() > 9300
        assert abs(np.log(w[small] / h[small]).mean()) < 0.04
        for start, spare in ((top, 100 - h), (left, 100 - w)):
            place = (start[spare > 20] + 0.5) / (spare[spare > 20] + 1)
            assert place.min() < 0.05 and place.max() > 0.95 and abs(place.mean() - 0.5) < 0.06

    def test_the_whole_image_can_come(self):
        assert (0, 0, 8, 8) in {tuple(box) for box in cut_boxes(8, 8, 100).tolist()}
        assert (cut_boxes(40, 30, 20, min_area=1.0)[:, 2:] >= (39, 29)).all()  # but for rounding
        image = noise_image(16, 16)
        np.testing.assert_array_equal(np.asarray(resized_crop(image, 16, np.random.default_rng(0), min_area=1.0)), np.asarray(image))

    def test_it_is_resized_as_torchvision_does(self):
        """Of an image so long that every draw is too high: the middle is taken."""
        image = noise_image(6, 200)
        theirs = RandomResizedCrop(9, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)(image)
        np.testing.assert_array_equal(np.asarray(resized_crop(image, 9, np.random.default_rng(0))), np.asarray(theirs))


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
        (lambda: CropConfig(crop="middle"), "middle.*center, random, resized"),
        (lambda: CropConfig(enlarge_range=(0.5, 1.0)), "enlarge_range"),
        (lambda: CropConfig(min_area=0.0), "min_area.*above 0"),
        (lambda: CropConfig(min_area=1.1), "min_area.*at most 1"),
        (lambda: ViewConfig(crops="ten"), "flip"),
        (lambda: ViewConfig(crops="nine"), "nine.*center, ten"),
        (lambda: ViewConfig(enlarge=0.9), "enlarge"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
