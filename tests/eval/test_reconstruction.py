from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.eval.features import load_extractor
from genvision.eval.metrics import psnr, ssim
from genvision.eval.reconstruction import pair_grid, reconstruct
from genvision.eval.report import format_table, to_json
from genvision.eval.sets import ArraySource
from genvision.images import from_uint8, to_uint8


class GrayLevels(nn.Module):
    """Codes are `codebook_size` levels of gray, one a pixel."""

    def __init__(self, codebook_size: int, shrink: int = 0) -> None:
        super().__init__()
        self.spec = SimpleNamespace(codebook_size=codebook_size)
        self.shrink = shrink

    def encode(self, images: Tensor) -> Tensor:
        assert not self.training
        return ((images.mean(dim=1) + 1) / 2 * (self.spec.codebook_size - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        images = codes[:, None].expand(-1, 3, -1, -1) / (self.spec.codebook_size - 1) * 2 - 1
        return images[:, :, self.shrink :]


class Continuous:
    spec = SimpleNamespace(codebook_size=None)

    def encode(self, images: Tensor) -> Tensor:
        return images / 2

    def decode(self, codes: Tensor) -> Tensor:
        return codes * 2


@pytest.fixture(scope="module")
def source(digits_first) -> ArraySource:
    return ArraySource(digits_first[0][:100], name="hundred digits")


def test_scores_are_means_over_all_images(source):
    tokenizer = GrayLevels(4)
    result = reconstruct(tokenizer, source, image_size=8, batch_size=32).result
    images = from_uint8(source.images)
    codes = tokenizer.eval().encode(images)
    back = to_uint8(tokenizer.decode(codes))
    assert result.psnr == pytest.approx(psnr(source.images, back).mean())
    assert result.ssim == pytest.approx(ssim(source.images, back).mean())
    assert result.ssim_range2 == pytest.approx(ssim(source.images, back, data_range=2.0).mean())
    share = torch.bincount(codes.flatten(), minlength=4).double() / codes.numel()
    assert result.codebook_usage == 1.0
    assert result.codebook_perplexity == pytest.approx(torch.distributions.Categorical(share).entropy().exp().item())
    assert result.rfid is None and result.extractor is None
    assert (result.num_images, result.image_size, result.data) == (100, 8, "hundred digits")


def test_batch_size_does_not_matter(source):
    extractor = load_extractor("digits")
    whole, ones = (reconstruct(GrayLevels(3), source, image_size=8, extractor=extractor, batch_size=size).result for size in (100, 7))
    assert ones.rfid == pytest.approx(whole.rfid, rel=1e-4)
    for key in ("psnr", "ssim", "codebook_perplexity"):
        assert getattr(ones, key) == pytest.approx(getattr(whole, key), rel=1e-12)


def test_rfid_is_zero_without_loss_and_grows_with_it(source):
    extractor = load_extractor("digits")
    exact, coarse, coarser = (
        reconstruct(tokenizer, source, image_size=8, extractor=extractor) for tokenizer in (Continuous(), GrayLevels(3), GrayLevels(2))
    )
    assert abs(exact.result.rfid) < 1e-4 < coarse.result.rfid < coarser.result.rfid
    np.testing.assert_array_equal(exact.originals, exact.reconstructions)
    assert exact.result.codebook_usage is exact.result.codebook_perplexity is exact.result.codebook_size is None
    assert '"psnr": null' in to_json(exact.result)
    assert "rFID" in format_table(coarse.result)


def test_a_module_in_train_mode_is_put_into_eval_mode_meanwhile(source):
    tokenizer = GrayLevels(4).train()
    reconstruct(tokenizer, source, image_size=8)
    assert tokenizer.training


def test_the_first_pairs_come_back_in_order_as_a_picture(source):
    found = reconstruct(GrayLevels(2), source, image_size=8, batch_size=3, num_pairs=5)
    np.testing.assert_array_equal(found.originals, source.images[:5])
    assert found.reconstructions.shape == (5, 8, 8, 3)
    assert set(np.unique(found.reconstructions)) <= {0, 255}
    assert found.grid(columns=5).height < found.grid(columns=3).height


def test_pairs_stand_below_each_other():
    dark, light = np.zeros((3, 8, 8, 3), dtype=np.uint8), np.full((3, 8, 8, 3), 200, dtype=np.uint8)
    sheet = np.asarray(pair_grid(dark, light, columns=2))
    right = sheet[:, -40]  # a column of pixels through the last picture of each row
    levels = [level for level in right[:, 0] if level != 255]
    assert sorted(set(levels)) == [0, 200]
    assert levels == sorted(levels)


def test_what_cannot_be_measured_is_refused(source):
    with pytest.raises(UserError, match="at least 2 images"):
        reconstruct(GrayLevels(4), ArraySource(source.images[:1]), image_size=8)
    with pytest.raises(UserError, match=r"made \[7, 8\] pixels of 8"):
        reconstruct(GrayLevels(4, shrink=1), source, image_size=8)
