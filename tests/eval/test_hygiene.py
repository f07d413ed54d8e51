import io

import numpy as np
import pytest
from PIL import Image

from genvision.eval.hygiene import (
    blockiness,
    count_duplicates,
    count_warning,
    duplicate_warning,
    format_warning,
    hash_images,
    hash_of_set,
    jpeg_warning,
    order_warning,
    score_hint,
)


def textures(num: int, side: int = 96) -> list[np.ndarray]:
    """Images with detail at every scale, as photographs have it."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    images = []
    for _ in range(num):
        spectrum = rng.standard_normal((3, side, side // 2 + 1)) * np.exp(2j * np.pi * rng.random((3, side, side // 2 + 1)))
        field = np.fft.irfft2(spectrum / np.maximum(frequencies, 1 / side) ** 1.2, s=(side, side))
        field = field / field.std(axis=(1, 2), keepdims=True)
        images.append((128 + 45 * field).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return images


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def test_hashes_tell_pixels_and_shapes_apart_and_nothing_else():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    hashes = hash_images(images)
    assert hashes.shape == (4, 16)
    np.testing.assert_array_equal(hash_images(images[::-1].copy())[::-1], hashes)
    changed = images.copy()
    changed[2, 0, 0, 0] ^= 1
    assert (hash_images(changed) == hashes).all(axis=1).tolist() == [True, True, False, True]
    assert not (hash_images(images.reshape(4, 8, 6, 3)) == hashes).all(axis=1).any()
    assert hash_of_set(hashes) == hash_of_set(hashes[::-1]) != hash_of_set(hashes[:3])
    assert hash_of_set(np.concatenate([hashes, hashes[:1]])) != hash_of_set(hashes)


def test_identical_images_are_counted_and_named():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    hashes = hash_images(np.concatenate([images, images[1:3], images[1:2]]))
    assert count_duplicates(hashes) == 3
    warning = duplicate_warning(hashes)
    assert warning.startswith("3 of 8 generated images") and "1 and 5, 2 and 6, 1 and 7" in warning
    assert "11 and 15" in duplicate_warning(hashes, np.arange(10, 18))
    assert duplicate_warning(hash_images(images)) is None


def test_small_sets_are_warned_about_by_their_features():
    assert "fewer than the 2,048 features" in count_warning(2000, "the set", 2048)
    assert "below 10,000" in count_warning(5000, "the set", 2048)
    assert count_warning(10_000, "the set", 2048) is None
    assert count_warning(100, "the set", 64) is None


def test_sets_sorted_by_class_are_noticed_by_label_and_by_look():
    labels = np.repeat(np.arange(10), 30)
    logits = np.eye(10)[labels] * 5 + np.random.default_rng(0).standard_normal((300, 10))
    assert "are sorted by class" in order_warning(labels, None)
    assert "look sorted by class" in order_warning(None, logits)
    order = np.random.default_rng(1).permutation(300)
    assert order_warning(labels[order], logits[order]) is None
    in_turn = np.argsort(np.tile(np.arange(30), 10), kind="stable")
    assert order_warning(labels[in_turn], logits[in_turn]) is None
    assert order_warning(np.zeros(300, dtype=np.int64), np.tile([[5.0, 0]], (300, 1))) is None


def test_jpeg_files_are_counted():
    assert format_warning({"PNG": 3}) is None
    assert "3 of 10 generated images are JPEG files" in format_warning({"PNG": 7, "JPEG": 3})


@pytest.mark.parametrize("quality", [50, 75])
def test_images_that_were_jpeg_are_noticed(quality):
    assert "8x8 pixels" in jpeg_warning([through_jpeg(image, quality) for image in textures(40)])


def test_images_that_were_not_are_not():
    images = textures(60)
    assert jpeg_warning(images) is None
    shrunk = [np.asarray(Image.fromarray(through_jpeg(image, 75)).resize((80, 80), Image.Resampling.BICUBIC)) for image in images]
    assert jpeg_warning(shrunk) is None  # photographs cropped and scaled, as in data sets
    assert jpeg_warning([through_jpeg(image, 50) for image in images[:5]]) is None  # too few to tell
    assert jpeg_warning([np.zeros((8, 8, 3), dtype=np.uint8)] * 50) is None


def test_blockiness_grows_as_quality_falls():
    image = textures(1, side=256)[0]
    values = [blockiness(through_jpeg(image, quality)) for quality in (95, 75, 30)]
    assert blockiness(image) < values[1] < values[2]
    assert values[0] < values[1]


def test_contradicting_scores_give_a_hint():
    assert "probably sorted" in score_hint({"fid": 3.0, "inception_score": 60.0}, 1000)
    assert score_hint({"fid": 3.0, "inception_score": 60.0}, 10) is None
    assert score_hint({"fid": 3.0, "inception_score": 250.0}, 1000) is None
    assert score_hint({"fid": None, "inception_score": 60.0}, 1000) is None
