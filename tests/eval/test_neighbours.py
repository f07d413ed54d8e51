"""Nearest training images: found exactly, whatever the batches; copies are counted and memorisation shows."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from genvision.data.sources import open_source
from genvision.errors import UserError
from genvision.eval.features import DigitsExtractor
from genvision.eval.nearest_search import RunningNearest
from genvision.eval.neighbour_sheet import neighbour_sheet
from genvision.eval.neighbours import (
    NeighbourConfig,
    NeighbourSearch,
    NeighboursResult,
    find_neighbours,
    format_neighbours,
    share_nearer,
    shown_rows,
)
from genvision.eval.report import to_json
from genvision.eval.result import validate
from genvision.eval.sets import ArraySource

FEW = NeighbourConfig(num=60, num_neighbours=3)


def random_images(num: int, seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def search(generated, train, held_out=None, config=FEW, **options) -> NeighbourSearch:
    sources = [ArraySource(images) if isinstance(images, np.ndarray) else images for images in (generated, train, held_out)]
    return find_neighbours(sources[0], sources[1], held_out=sources[2], config=config, **options)


def collect(queries: torch.Tensor, rows: torch.Tensor, num: int, metric: str, batch: int):
    nearest = RunningNearest(queries, num, metric)
    for start in range(0, len(rows), batch):
        nearest.update(rows[start : start + batch], np.arange(start, min(start + batch, len(rows))))
    return nearest.finish()


@pytest.mark.parametrize("metric", ["cosine", "l2", "rms"])
@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_the_nearest_are_those_of_a_full_comparison(metric, batch):
    generator = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(20, 6, generator=generator), torch.randn(200, 6, generator=generator)
    found = collect(queries, rows, 4, metric, batch)
    a, b = queries.double(), rows.double()
    if metric == "cosine":
        distances = 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    else:
        distances = (a[:, None] - b[None]).square().sum(2).div(6 if metric == "rms" else 1).sqrt()
    expected = distances.sort(dim=1)
    np.testing.assert_array_equal(found.indices, expected.indices[:, :4].numpy())
    np.testing.assert_allclose(found.distances, expected.values[:, :4].numpy(), rtol=1e-5, atol=1e-7)


def test_near_copies_far_from_the_origin_are_told_apart():
    """Where |a|^2 - 2ab + |b|^2 in float32 sees only rounding, the exact distance must decide; the copy itself is at 0."""
    base = 1000 + torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([3.0, 1.0, 0.0, 2.0]) * 1e-3
    rows = base + steps[:, None] * torch.ones(1, 64)
    found = collect(base, rows, 4, "l2", batch=4)
    assert found.indices[0].tolist() == [2, 1, 3, 0] and found.distances[0, 0] == 0


def test_of_equal_images_the_earlier_comes_first():
    found = collect(torch.zeros(1, 3), torch.ones(6, 3), 2, "l2", batch=2)
    assert found.indices.tolist() == [[0, 1]]


def test_a_generator_that_copies_is_found_out(digits_first, digits_second):
    train, held_out = digits_first[0], digits_second[0]
    found = search(train[100:160], train, held_out[:500], dataclasses.replace(FEW, num=500), extractor=DigitsExtractor())
    result = found.result
    assert result.copies == 60 and result.held_out_copies == 0
    assert result.features_below_p1 == result.pixels_below_p5 == 1.0 and result.pixels_nearer > 0.99
    assert any("60 of 60 generated images equal a training image" in line for line in result.warnings)
    np.testing.assert_array_equal(found.spaces["pixels"].indices[:60, 0], np.arange(100, 160))
    assert (found.spaces["pixels"].distances[:60, 0] == 0).all() and (found.spaces["pixels"].distances[60:, 0] > 0).all()


def test_a_copy_with_a_little_noise_is_no_exact_copy_but_still_too_near(digits_first, digits_second):
    train = digits_first[0]
    noise = np.random.default_rng(0).integers(-3, 4, (60, 8, 8, 3))
    generated = np.clip(train[100:160].astype(np.int64) + noise, 0, 255).astype(np.uint8)
    result = search(generated, train, digits_second[0][:500], dataclasses.replace(FEW, num=500)).result
    assert result.copies == 0 and result.pixels_below_p1 == 1.0


def test_fresh_images_are_as_far_as_held_out_ones(digits_second):
    """Parts of one set drawn at random: nothing is memorised, so about 5 % lie below the fifth percentile."""
    images, shares, covered = digits_second[0], [], 0
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(images))
        generated, held_out, train = images[order[:250]], images[order[250:500]], images[order[500:]]
        result = search(generated, train, held_out, dataclasses.replace(FEW, num=250), extractor=DigitsExtractor()).result
        for space in ("features", "pixels"):
            assert 0.42 < getattr(result, f"{space}_nearer") < 0.58
            shares.append(getattr(result, f"{space}_below_p5"))
            low, high = getattr(result, f"{space}_below_p5_interval")
            covered += low <= 0.05 <= high
    assert 0.03 < np.mean(shares) < 0.075
    assert covered >= 7
    assert any("250 held-out images are few" in line for line in result.warnings)


def test_held_out_images_that_stand_in_the_training_set_are_noticed():
    train = random_images(50, 0)
    result = search(random_images(20, 1), train, np.concatenate([train[:2], random_images(18, 2)])).result
    assert result.held_out_copies == 2
    assert any("2 of 20 held-out images are in the training set" in line for line in result.warnings)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 0), (64, 1)])
def test_batches_and_workers_change_nothing(batch_size, num_workers):
    train, generated, held_out = random_images(40, 0), random_images(10, 1), random_images(10, 2)
    whole = search(generated, train, held_out)
    other = search(generated, train, held_out, dataclasses.replace(FEW, batch_size=batch_size), num_workers=num_workers)
    for space, found in whole.spaces.items():
        np.testing.assert_array_equal(found.indices, other.spaces[space].indices)
        np.testing.assert_array_equal(found.distances, other.spaces[space].distances)
    plain = {"seconds": 0, "batch_size": 0}
    assert dataclasses.replace(whole.result, **plain) == dataclasses.replace(other.result, **plain)


def test_images_are_drawn_by_seed_and_without_replacement():
    train, generated = random_images(20, 0), random_images(50, 1)
    config = NeighbourConfig(num=30, num_neighbours=1)
    first, again, other = (search(generated, train, config=dataclasses.replace(config, seed=seed)) for seed in (0, 0, 1))
    assert len(np.unique(first.generated)) == 30 and (first.generated == again.generated).all()
    assert (first.generated != other.generated).any()


def test_large_images_are_compared_by_means_over_areas():
    train, generated = random_images(3, 0, side=64), random_images(2, 1, side=64)
    found = search(generated, train)
    small = [images.reshape(-1, 32, 2, 32, 2, 3).astype(np.float64).mean(axis=(2, 4)) for images in (generated, train)]
    expected = np.sqrt(np.square(small[0][:, None] - small[1][None]).mean(axis=(2, 3, 4)))
    np.testing.assert_allclose(found.spaces["pixels"].distances, np.sort(expected, axis=1), rtol=1e-5)
    assert "at 32x32 pixels" in found.result.pixels_metric


def test_without_held_out_images_nothing_is_claimed():
    result = search(random_images(5, 0), random_images(20, 1)).result
    assert result.pixels_below_p1 is None and result.pixels_nearer is None and result.held_out_copies is None
    assert any("no held-out images were given" in line for line in result.warnings)


def test_shares_count_ties_half():
    assert share_nearer(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx((2 + 0.5 + 1) / 4)
    assert share_nearer(np.array([0.0]), np.array([1.0, 2.0])) == 1.0
    assert share_nearer(np.array([5.0]), np.array([1.0, 2.0])) == 0.0


def test_the_sheet_shows_the_nearest_first_and_then_others():
    generated, train = random_images(30, 0), random_images(40, 1)
    generated[17] = train[5]
    found = search(generated, train, random_images(10, 2))
    rows = shown_rows(found.spaces, 30, 8)
    assert rows[0] == 17 and len(set(rows)) == 8
    ranked = np.argsort(found.spaces["pixels"].distances[:30, 0], kind="stable")
    assert rows[:4] == ranked[:4].tolist()
    assert len(shown_rows(found.spaces, 30, 100)) == 30 and shown_rows(found.spaces, 30, 1) == [17]
    assert found.result.nearest[0]["image"] == 17
    assert found.result.nearest[0]["pixels"]["names"][0] == "array[5]" and found.result.nearest[0]["pixels"]["distances"][0] == 0


def test_a_copied_image_stands_twice_in_its_row_of_the_sheet():
    generated, train = random_images(6, 0), random_images(10, 1)
    generated[2] = train[7] = np.full((8, 8, 3), (255, 0, 128), dtype=np.uint8)
    sources = ArraySource(generated), ArraySource(train)
    sheet = np.asarray(neighbour_sheet(search(*sources), *sources, num_shown=2))
    found = (sheet == (255, 0, 128)).all(axis=2)
    assert found.sum() == 2 * 64 * 64
    columns = np.flatnonzero(found.any(axis=0))
    assert (np.diff(columns) > 1).sum() == 1, "two separate squares"
    assert len(np.flatnonzero(found.any(axis=1))) == 64, "in one row"


def test_the_result_is_json_of_its_schema_and_a_table(digits_first):
    result = search(digits_first[0][:20], digits_first[0][20:], random_images(10, 0), extractor=DigitsExtractor()).result
    content = json.loads(to_json(result))
    validate(content, "neighbours", NeighboursResult)
    assert content["schema"] == "genvision.neighbours/1" and content["features_metric"] == "1 - cosine"
    table = format_neighbours(result)
    assert "copies" in table and "names" not in table


@pytest.mark.parametrize(
    ("generated", "train", "message"),
    [
        (random_images(3, 0), random_images(2, 1), "holds 2 images, fewer than the 3 neighbours"),
        (random_images(3, 0, side=16), random_images(9, 1), "has images of 16x16 pixels, array of 8x8; give --image-size"),
    ],
)
def test_what_cannot_be_searched_is_refused(generated, train, message):
    with pytest.raises(UserError, match=message):
        search(generated, train)


def test_sets_of_other_sizes_are_cropped_if_asked():
    assert search(random_images(3, 0, side=16), random_images(9, 1), image_size=8).result.crop == "ADM centre crop to 8"
    assert search(open_source("digits:first"), open_source("digits:second")).result.crop == "none"


@pytest.mark.parametrize("wrong", [{"num": 0}, {"num_neighbours": 0}, {"metric": "l1"}, {"batch_size": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        NeighbourConfig(**wrong)
