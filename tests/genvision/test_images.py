"""Images at the borders: which float becomes which byte, grids, and files that are whole or not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.errors import UserError
from genvision.images import from_uint8, make_grid, save_npz, save_png, to_uint8

LEVELS = torch.arange(256)


def as_image(values: torch.Tensor) -> torch.Tensor:
    """Any number of values as one image [1, 3, N, 1]."""
    return values.view(1, 1, -1, 1).expand(1, 3, -1, 1)


def levels(values: torch.Tensor, rounding: str) -> np.ndarray:
    array = to_uint8(as_image(values), rounding)
    assert (array == array[..., :1]).all()
    return array[0, :, 0, 0].astype(int)


class TestRounding:
    @pytest.mark.parametrize("rounding", ["trunc127.5", "round"])
    def test_every_level_comes_back(self, rounding):
        np.testing.assert_array_equal(levels(LEVELS / 127.5 - 1, rounding), LEVELS)

    def test_trunc255_comes_back_from_unit_range(self):
        # exact on k / 255 in [0, 1]; the way over [-1, 1] must not lose a level to float32
        values = LEVELS.double() / 255 * 2 - 1
        off = levels(values.float(), "trunc255") - LEVELS.numpy()
        assert set(off.tolist()) <= {-1, 0}

    @pytest.mark.parametrize(("rounding", "mean"), [("trunc127.5", 0.0), ("round", 0.0), ("trunc255", -0.5)])
    def test_mean_error_in_levels(self, rounding, mean):
        x = torch.linspace(-0.99, 0.99, 100_001, dtype=torch.float64)
        error = levels(x.float(), rounding) - (x + 1).numpy() * 127.5
        assert abs(error.mean() - mean) < 2e-3

    @pytest.mark.parametrize(
        ("rounding", "expected"),
        [("trunc127.5", [0, 0, 128, 255, 255]), ("trunc255", [0, 0, 127, 255, 255]), ("round", [0, 0, 128, 255, 255])],
    )
    def test_values_outside_are_clamped(self, rounding, expected):
        assert levels(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), rounding).tolist() == expected

    def test_the_default_is_what_dit_and_llamagen_do(self):
        x = torch.rand(2, 3, 5, 4) * 2.4 - 1.2
        official = torch.clamp(127.5 * x + 128.0, 0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        np.testing.assert_array_equal(to_uint8(x), official)

    def test_half_precision_is_rounded_as_float32(self):
        x = torch.rand(1, 3, 64, 64).mul(2).sub(1).bfloat16()
        np.testing.assert_array_equal(to_uint8(x), to_uint8(x.float()))

    def test_an_unknown_rule_is_named(self):
        with pytest.raises(UserError, match="rounding 'floor' is unknown; choose one of trunc127"):
            to_uint8(torch.zeros(1, 3, 2, 2), "floor")

    def test_bytes_become_floats_and_axes_move(self):
        array = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
        images = from_uint8(array)
        assert images.shape == (2, 3, 4, 5) and images.dtype == torch.float32
        assert images[1, 2, 3, 4] == pytest.approx(array[1, 3, 4, 2] / 127.5 - 1)
        assert (from_uint8(np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1).repeat(3, 3)).unique()).tolist() == [-1.0, 1.0]


class TestGrid:
    @pytest.fixture
    def images(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 255, (5, 8, 6, 3), dtype=np.uint8)

    def test_small_images_are_enlarged_by_a_whole_factor(self, images):
        sheet = np.asarray(make_grid(images, 3, min_side=16, gap=2))
        factor = 3  # the short side of 6 pixels reaches 18
        assert sheet.shape == (2 + 2 * (24 + 2), 2 + 3 * (18 + 2), 3)
        for i, image in enumerate(images):
            y, x = 2 + i // 3 * 26, 2 + i % 3 * 20
            np.testing.assert_array_equal(sheet[y : y + 24, x : x + 18], image.repeat(factor, 0).repeat(factor, 1))
        assert (sheet[2 + 26 :, 2 + 2 * 20 :] == 255).all()  # the place of the sixth stays white

    def test_large_images_stay(self):
        assert make_grid(np.zeros((2, 100, 70, 3), dtype=np.uint8), 2, gap=0).size == (140, 100)

    def test_rows_may_have_names(self, images):
        plain, named = (np.asarray(make_grid(images, 3, row_names=names)) for names in (None, ["cat", "a dog"]))
        margin = named.shape[1] - plain.shape[1]
        assert margin > 30 and named.shape[0] == plain.shape[0]
        np.testing.assert_array_equal(named[:, margin + 2 :], plain[:, 2:])
        assert (named[:, :margin] < 128).any()


class TestFiles:
    @pytest.fixture
    def array(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)

    def test_a_png_holds_every_pixel(self, array, tmp_path):
        save_png(array[0], tmp_path / "below" / "a.png")
        save_png(Image.fromarray(array[1]), tmp_path / "below" / "a.png")  # replaces
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "below" / "a.png")), array[1])
        assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.png"]

    def test_an_npz_is_as_adm_reads_it(self, array, tmp_path):
        save_npz(tmp_path / "below" / "a.npz", array, np.array([2, 0, 1], dtype=np.int32))
        with np.load(tmp_path / "below" / "a.npz", allow_pickle=False) as file:
            assert file.files == ["arr_0", "arr_1"]
            np.testing.assert_array_equal(file["arr_0"], array)
            assert file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == [2, 0, 1]
        save_npz(tmp_path / "below" / "a.npz", array)
        with np.load(tmp_path / "below" / "a.npz", allow_pickle=False) as file:
            assert file.files == ["arr_0"]
        assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.npz"]

    @pytest.mark.parametrize("name", ["a.png", "a.npz"])
    def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises((KeyError, TypeError, ValueError, OSError)):
            if name == "a.png":
                save_png(Image.new("LAB", (2, 2)), tmp_path / name)  # PNG cannot hold this
            else:
                save_npz(tmp_path / name, np.zeros((1, 2, 2, 3)), np.array(["cat"]))  # labels that are no numbers
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"old"}
