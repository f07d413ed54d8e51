"""Pixels as latents; what holds for every tokenizer is in test_contract.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.errors import UserError
from genvision.images import from_uint8, to_uint8
from genvision.tokenizers.base import content_hash, load_tokenizer, open_tokenizer
from genvision.tokenizers.pixels import PixelTokenizer


def bytes_of_pictures(num: int = 3, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def test_plain_pixels_are_the_images():
    images, model = from_uint8(bytes_of_pictures()), PixelTokenizer(image_size=6)
    assert torch.equal(model.encode(images), images) and torch.equal(model.decode(images), images)
    assert model.spec.code_shape() == (3, 6, 6) and not model.spec.discrete


def test_every_byte_comes_back_through_standardised_pixels():
    original = bytes_of_pictures()
    model = PixelTokenizer(image_size=6, latent_mean=(0.1, -0.2, 0.3), latent_std=(0.4, 0.6, 0.5))
    latents = model.encode(from_uint8(original))
    torch.testing.assert_close(latents[:, 1], (from_uint8(original)[:, 1] + 0.2) / 0.6)
    np.testing.assert_array_equal(to_uint8(model.decode(latents)), original)


def test_gray_pixels_are_the_luminance_that_pil_knows():
    original = bytes_of_pictures()
    model = PixelTokenizer(image_size=6, channels=1, latent_mean=-0.3, latent_std=0.5)
    latents = model.encode(from_uint8(original))
    assert latents.shape == (3, 1, 6, 6)
    decoded = to_uint8(model.decode(latents))
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in original])
    for channel in range(3):
        assert np.abs(decoded[..., channel].astype(int) - expected).max() <= 1  # PIL's weights are rounded to 1 / 65536


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_every_gray_byte_comes_back_through_one_channel(level):
    original = np.full((1, 4, 4, 3), level, dtype=np.uint8)
    model = PixelTokenizer(image_size=4, channels=1)
    np.testing.assert_array_equal(to_uint8(model.decode(model.encode(from_uint8(original)))), original)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_has_a_device_and_a_dtype_and_keeps_them_through_a_file(channels, tmp_path):
    model = PixelTokenizer(image_size=6, channels=channels)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32 and model.num_parameters() == 0
    assert model.to("meta").device == torch.device("meta")
    model = PixelTokenizer(image_size=6, channels=channels, latent_std=0.5).to(torch.bfloat16)
    assert model.encode(torch.zeros(1, 3, 6, 6)).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path)  # as in a pipeline folder
    assert again.spec == model.spec and again.config.latent_std == 0.5 and not again.training


def test_a_name_stands_for_pixels_and_a_folder_for_what_it_holds(tmp_path, monkeypatch):
    colour, gray = open_tokenizer("pixels", 8), open_tokenizer("pixels:gray", 16)
    assert colour.spec.code_shape() == (3, 8, 8) and gray.spec.code_shape() == (1, 16, 16) and not colour.training
    gray.save_pretrained(tmp_path / "pixels")
    for image_size in (None, 16):
        assert content_hash(open_tokenizer(str(tmp_path / "pixels"), image_size)) == content_hash(gray)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert content_hash(open_tokenizer("~/pixels", None)) == content_hash(gray)
    with pytest.raises(UserError, match=r"data\.image_size is missing"):
        open_tokenizer("pixels", None)
    with pytest.raises(UserError, match="'pixels:grey' is unknown; give pixels or pixels:gray"):
        open_tokenizer("pixels:grey", 8)
    with pytest.raises(UserError, match="no tokenizer here"):
        open_tokenizer(str(tmp_path / "nowhere"), 8)


def test_training_it_is_refused_in_one_line():
    model = PixelTokenizer(image_size=6)
    for attempt in (lambda: model(torch.zeros(1, 3, 6, 6)), lambda: model.last_layer):
        with pytest.raises(UserError, match="cannot be trained") as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=2), "channels is 2"),
        (dict(image_size=0), "image_size must be at least 1"),
        (dict(channels=1, latent_mean=(0.1, 0.2, 0.3)), "latent_mean has 3 values"),
        (dict(latent_std=0.0), "latent_std must be above 0"),
    ],
)
def test_wrong_options_are_told_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        PixelTokenizer(**options)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 3, 2, 4, 4)])
def test_only_images_are_taken(shape):
    model = PixelTokenizer(image_size=4)
    for function in (model.encode, model.decode):
        with pytest.raises(UserError, match="is expected"):
            function(torch.zeros(shape))
