"""Augmentation of tokens: against the authors' numbers, and what each step must keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genvision.data.order import sample_rng
from genvision.data.token_augment import (
    TokenAugmentation,
    TokenAugmentConfig,
    add_noise,
    center_crop_tokens,
    color_adapt,
    crop_and_resize,
    embed,
    nearest_codes,
    random_box,
    replace_by_synonyms,
    swap_squares,
)
from genvision.errors import UserError
from parity_fixtures import Fixture

NOTHING = {"synonym_probability": 0.0, "swap_probability": 0.0, "noise_probability": 0.0, "color_probability": 0.0}


@pytest.fixture(scope="module")
def fixture():
    return Fixture("seit_tokens")


@pytest.fixture(scope="module")
def cropped(fixture):
    """[3, 32, 28, 28]"""
    tokens = fixture.outputs["tokens"].view(3, 32, 32)
    return crop_and_resize(tokens, fixture.state["codebook"], [tuple(fixture.inputs["crop_ijhw"].tolist())] * 3, 28)


@pytest.fixture(scope="module")
def codebook():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def tokens(num=5, side=16):
    return torch.randint(50, (num, side, side), generator=torch.Generator().manual_seed(2))


def rngs(positions):
    return [sample_rng(3, position) for position in positions]


def test_crops_are_the_authors(fixture, cropped):
    torch.testing.assert_close(cropped[:, :, ::7, ::7], fixture.outputs["cropped_embedding"], atol=fixture.atol, rtol=0)


def test_color_adapt_is_the_authors(fixture, cropped):
    adapted = color_adapt(cropped, torch.tensor([2, 1, 0]))
    torch.testing.assert_close(adapted[:, :, ::7, ::7], fixture.outputs["color_adapted_flip"], atol=fixture.atol, rtol=0)


def test_embeddings_resized_are_one_hot_planes_resized(codebook):
    boxes = [(0, 0, 16, 16), (3, 1, 7, 12), (15, 15, 1, 1), (2, 9, 14, 5), (0, 4, 4, 4)]
    planes = F.one_hot(tokens(), 50).permute(0, 3, 1, 2).float()
    for image, plane, (i, j, h, w) in zip(crop_and_resize(tokens(), codebook, boxes, 12), planes, boxes, strict=True):
        resized = F.interpolate(plane[None, :, i : i + h, j : j + w], (12, 12), mode="bicubic", align_corners=False)[0]
        torch.testing.assert_close(image, torch.einsum("khw,kd->dhw", resized, codebook), atol=1e-5, rtol=0)


def test_the_whole_grid_at_its_own_size_is_the_codebook_looked_up(codebook):
    x = crop_and_resize(tokens(), codebook, [(0, 0, 16, 16)] * 5, 16)
    torch.testing.assert_close(x, embed(tokens(), codebook), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[2, :, 3, 7], codebook[tokens()[2, 3, 7]], atol=1e-6, rtol=0)


def test_boxes_lie_in_the_grid_and_have_the_areas_and_ratios_asked_for():
    rng = sample_rng(0, 0)
    boxes = np.array([random_box((32, 24), rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height).max() == 32 and (left + width).max() == 24 and top.min() == left.min() == 0
    share = height * width / (32 * 24)
    assert share.min() < 0.1 and share.max() > 0.9
    assert 0.4 < share.mean() < 0.55
    assert 0.9 < np.exp(np.log(width / height).mean()) < 1.05
    assert random_box((32, 32), rng, scale=(1, 1), ratio=(1, 1)) == (0, 0, 32, 32)
    assert random_box((4, 32), rng, scale=(1, 1)) == (0, 13, 4, 5)  # no such box exists: the middle


def test_nearest_codes_are_near_and_never_the_code_itself(codebook):
    near = nearest_codes(codebook, 5)
    distances = torch.cdist(codebook, codebook)
    for code in range(50):
        order = [other for other in distances[code].argsort().tolist() if other != code]
        assert near[code].tolist() == order[:5]
    twins = torch.cat([codebook, codebook])
    assert (nearest_codes(twins, 3)[:, 0] == (torch.arange(100) + 50) % 100).all()
    with pytest.raises(UserError, match="50 codes"):
        nearest_codes(codebook, 50)


def test_a_quarter_of_the_tokens_become_synonyms(codebook):
    near, grid = nearest_codes(codebook, 5), tokens()[0]
    replaced = replace_by_synonyms(grid, near, 0.25, sample_rng(0, 1))
    changed = replaced != grid
    assert changed.sum() == 64
    assert all(new in near[old] for old, new in zip(grid[changed], replaced[changed], strict=True))
    assert torch.equal(grid, tokens()[0])


@pytest.mark.parametrize("shape", [(16, 16), (2, 2), (5, 9), (1, 3), (32, 20)])
def test_swapping_moves_tokens_and_loses_none(shape):
    grid = torch.arange(shape[0] * shape[1]).view(shape)
    rng, sides = sample_rng(0, 2), set()
    for _ in range(200):
        swapped = swap_squares(grid, rng)
        assert torch.equal(swapped.flatten().sort().values, grid.flatten())
        num_moved = int((swapped != grid).sum())
        side = round((num_moved / 2) ** 0.5)
        assert num_moved == 2 * side * side
        sides.add(side)
    assert sides == set(range(1, max(1, min(shape) // 4) + 1))


def test_one_token_cannot_be_swapped():
    with pytest.raises(UserError, match="no two squares"):
        swap_squares(torch.zeros(1, 1, dtype=torch.int64), sample_rng(0, 0))


def test_noise_has_a_part_by_channel_and_one_by_element():
    noise = add_noise(torch.zeros(400, 10, 10), sample_rng(0, 3))
    assert abs(noise.var() - 2) < 0.15
    assert abs(noise.mean((1, 2)).var() - 1.01) < 0.15
    assert abs((noise - noise.mean((1, 2), keepdim=True)).var() - 0.99) < 0.05


def test_color_adapt_takes_the_partner_statistics():
    x = torch.randn(4, 3, 6, 6) * torch.rand(4, 3, 1, 1) + torch.randn(4, 3, 1, 1)
    adapted = color_adapt(x, torch.tensor([1, 2, 3, 0]))
    torch.testing.assert_close(adapted.std((2, 3)), x.std((2, 3)).roll(-1, 0))
    torch.testing.assert_close(adapted.mean((2, 3)), x.mean((2, 3)).roll(-1, 0))
    torch.testing.assert_close(color_adapt(x, torch.arange(4)), x)
    x[0] = 2.0
    assert color_adapt(x, torch.tensor([1, 0, 2, 3])).isfinite().all()


def test_evaluation_takes_the_middle():
    middle = center_crop_tokens(tokens(2, 32), 28)
    assert torch.equal(middle, tokens(2, 32)[:, 2:30, 2:30])
    with pytest.raises(UserError, match="does not fit a grid of 16 x 16"):
        center_crop_tokens(tokens(), 28)


class TestTogether:
    def test_an_image_is_the_same_whatever_its_batch(self, codebook):
        augment = TokenAugmentation(codebook, TokenAugmentConfig(size=14, noise_probability=0.6, color_probability=0.0))
        together = augment(tokens(), rngs(range(5)))
        assert together.shape == (5, 6, 14, 14)
        for i in range(5):
            assert torch.equal(augment(tokens()[i : i + 1], rngs([i])), together[i : i + 1])
        assert not torch.equal(augment(tokens(), rngs(range(5, 10))), together)
        assert torch.equal(augment(tokens().flip(0), rngs([4, 3, 2, 1, 0])), together.flip(0))

    def test_without_chances_only_the_crop_is_left(self, codebook):
        config = TokenAugmentConfig(size=16, scale=(1, 1), ratio=(1, 1), **NOTHING)
        torch.testing.assert_close(TokenAugmentation(codebook, config)(tokens(), rngs(range(5))), embed(tokens(), codebook))

    def test_color_adapt_draws_another_image_of_the_batch(self, codebook):
        config = TokenAugmentConfig(size=16, scale=(1, 1), ratio=(1, 1), **{**NOTHING, "color_probability": 1.0})
        augment, plain = TokenAugmentation(codebook, config), embed(tokens(), codebook)
        means = augment(tokens(), rngs(range(5))).mean((2, 3))
        for i in range(5):
            distances = (plain.mean((2, 3)) - means[i]).norm(dim=1)
            assert distances.min() < 1e-5 and distances.argmin() != i
        torch.testing.assert_close(augment(tokens()[:1], rngs([0])), plain[:1])

    def test_chances_are_as_configured(self, codebook):
        side, num = 4, 1500
        grid = torch.arange(16).view(1, side, side).expand(num, side, side)
        whole = {"size": side, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        plain = embed(grid, codebook)
        for name in ("synonym_probability", "swap_probability", "noise_probability"):
            augment = TokenAugmentation(codebook, TokenAugmentConfig(**whole, **{**NOTHING, name: 0.25}))
            changed = (augment(grid, rngs(range(num))) - plain).abs().amax((1, 2, 3)) > 1e-4
            assert 0.21 < changed.float().mean() < 0.29, name

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"swap_probability": 1.5}, "swap_probability must lie in 0 .. 1"),
            ({"noise_probability": 0.8, "color_probability": 0.4}, "their sum must be at most 1"),
            ({"size": 0}, "size and num_synonyms"),
            ({"scale": (0.5, 0.2)}, "scale must be two rising numbers"),
        ],
    )
    def test_impossible_options_are_refused(self, options, said):
        with pytest.raises(UserError, match=said):
            TokenAugmentConfig(**options)

    def test_tokens_of_another_codebook_are_refused(self, codebook):
        with pytest.raises(UserError, match=r"0 \.\. 50, but the codebook given has 50 codes"):
            embed(torch.tensor([[[0, 50]]]), codebook)
