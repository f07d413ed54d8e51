"""Which tokens of a picture a sampling job keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.data.transforms import center_crop
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.jobs.known_tokens import known_tokens
from genvision.pipeline import ImagePipeline


@pytest.fixture(scope="module")
def pipeline(tiny_model) -> ImagePipeline:
    """Images of 8 x 8 pixels, 4 x 4 tokens."""
    return ImagePipeline.from_pretrained(tiny_model)


@pytest.fixture
def save(tmp_path):
    """Write an array as a picture."""

    def write(name: str, array: np.ndarray) -> Path:
        Image.fromarray(array).save(tmp_path / name)
        return tmp_path / name

    return write


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.uint8)


def tokens_of(pipeline: ImagePipeline, picture: Path) -> torch.Tensor:
    image = np.asarray(center_crop(Image.open(picture), 8))
    return pipeline.tokenizer.encode(from_uint8(image[None]))[0]


class TestCompletion:
    @pytest.mark.parametrize(("keep", "rows"), [(0.25, 1), (None, 2), (0.5, 2), (0.75, 3)])
    def test_the_upper_tokens_stay(self, pipeline, save, keep, rows):
        picture = save("picture.png", noise(8, 8))
        known = known_tokens(pipeline, complete=picture, keep=keep)
        assert known.dtype == torch.int64 and known.shape == (4, 4)
        assert torch.equal(known[:rows], tokens_of(pipeline, picture)[:rows]) and (known[rows:] == -1).all()

    def test_without_a_picture_nothing_is_known(self, pipeline):
        assert known_tokens(pipeline) is None


class TestMask:
    @pytest.mark.parametrize(("y", "x"), [(0, 0), (1, 1), (2, 5), (7, 0), (4, 7)])
    def test_one_white_pixel_frees_its_token_alone(self, pipeline, save, y, x):
        picture, white = save("picture.png", noise(8, 8)), black(8, 8)
        white[y, x] = 255
        expected = tokens_of(pipeline, picture)
        expected[y // 2, x // 2] = -1
        assert torch.equal(known_tokens(pipeline, init=picture, mask=save("mask.png", white)), expected)

    def test_white_is_the_upper_half_of_the_grey_levels(self, pipeline, save):
        picture = save("picture.png", noise(8, 8))
        assert torch.equal(
            known_tokens(pipeline, init=picture, mask=save("grey.png", np.full((8, 8), 127, np.uint8))), tokens_of(pipeline, picture)
        )
        assert (known_tokens(pipeline, init=picture, mask=save("light.png", np.full((8, 8), 128, np.uint8))) == -1).all()
        coloured = np.zeros((8, 8, 3), np.uint8)
        coloured[:, 4:] = 255
        assert torch.equal(
            known_tokens(pipeline, init=picture, mask=save("colour.png", coloured)) == -1, (torch.arange(4) >= 2).expand(4, 4)
        )

    @pytest.mark.parametrize(
        ("height", "width", "white", "token"),
        [
            (16, 32, (slice(4, 8), slice(12, 16)), (1, 1)),  # halved to 8 x 16; the crop begins at column 8 of the original
            (32, 16, (slice(20, 24), slice(0, 4)), (3, 0)),
            (12, 24, (slice(9, 12), slice(12, 15)), (3, 2)),  # two thirds of it
            (8, 12, (slice(0, 2), slice(2, 4)), (0, 0)),  # cropped only
            (4, 4, (slice(1, 2), slice(2, 3)), (1, 2)),  # enlarged
        ],
    )
    def test_a_mask_is_cropped_as_its_picture_is(self, pipeline, save, height, width, white, token):
        picture, mask = save("picture.png", noise(height, width)), black(height, width)
        mask[white] = 255
        side = min(height, width)
        outside = np.ones_like(mask, dtype=bool)  # of the crop; white there means nothing
        top, left = (height - side) // 2, (width - side) // 2
        outside[top : top + side, left : left + side] = False
        mask[outside] = 255
        expected = tokens_of(pipeline, picture)
        expected[token] = -1
        assert torch.equal(known_tokens(pipeline, init=picture, mask=save("mask.png", mask)), expected)

    def test_a_large_mask_stays_sharp(self, pipeline, save):
        """Bicubic sampling would make the white next to an edge grey."""
        picture, mask = save("picture.png", noise(20, 20)), black(20, 20)
        mask[:, 10:] = 255
        freed = known_tokens(pipeline, init=picture, mask=save("mask.png", mask)) == -1
        assert torch.equal(freed, (torch.arange(4) >= 2).expand(4, 4))

    def test_a_single_white_pixel_of_a_large_mask_is_not_passed_over(self, pipeline, save):
        picture, mask = save("picture.png", noise(40, 40)), black(40, 40)
        mask[1, 38] = 255
        freed = known_tokens(pipeline, init=picture, mask=save("mask.png", mask)) == -1
        assert freed.nonzero().tolist() == [[0, 3]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"init"}, "--init needs --mask"),
            ({"mask"}, "--mask needs --init"),
            ({"init", "mask", "complete"}, "give one of them"),
            ({"init", "mask", "keep"}, "give --complete, too"),
            ({"keep"}, "give --complete, too"),
        ],
    )
    def test_options_that_do_not_go_together(self, pipeline, save, given, message):
        options = {"init": save("picture.png", noise(8, 8)), "mask": save("mask.png", black(8, 8)), "keep": 0.5}
        options["complete"] = options["init"]
        with pytest.raises(UserError, match=message):
            known_tokens(pipeline, **{name: options[name] for name in given})

    def test_a_mask_of_another_size(self, pipeline, save):
        with pytest.raises(UserError, match=r"mask\.png: has 16 x 8 pixels, and .*picture\.png has 8 x 9; the mask must have the size"):
            known_tokens(pipeline, init=save("picture.png", noise(9, 8)), mask=save("mask.png", black(8, 16)))

    def test_files_that_are_no_pictures(self, pipeline, save, tmp_path):
        good, bad = save("picture.png", noise(8, 8)), tmp_path / "text.png"
        bad.write_text("no picture")
        for init, mask in ((good, bad), (bad, good)):
            with pytest.raises(UserError, match=r"text\.png: cannot be read"):
                known_tokens(pipeline, init=init, mask=mask)
        with pytest.raises(UserError, match="nothing: no such file"):
            known_tokens(pipeline, init=good, mask=tmp_path / "nothing")

    def test_models_of_latents(self, tiny_flow, save):
        picture, mask = save("picture.png", noise(8, 8)), save("mask.png", black(8, 8))
        with pytest.raises(UserError, match="--init: this model draws latents"):
            known_tokens(ImagePipeline.from_pretrained(tiny_flow), init=picture, mask=mask)
