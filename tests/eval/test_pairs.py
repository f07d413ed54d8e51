import numpy as np
import pytest

from genvision.eval.pairs import PairKeeper, pair_sheet

NUM = 40


def numbered(levels: np.ndarray, side: int = 8) -> np.ndarray:
    """uint8 [N, side, side, 3], each of one colour, which no gray of a letter equals."""
    colours = np.stack([levels, 255 - levels, np.full(len(levels), 255)], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (len(levels), side, side, 3)).copy()


def places_of(level: int, sheet: np.ndarray) -> np.ndarray:
    """Where `numbered([level])` is to be seen, bool [H, W]."""
    found: np.ndarray = (sheet == numbered(np.array([level]), side=1)[0, 0, 0]).all(axis=-1)
    return found


def kept(measure: str, values: np.ndarray, num: int = 3, batch: int = 7) -> dict[str, list[int]]:
    keeper = PairKeeper(num, measure)
    for places in np.array_split(np.random.default_rng(1).permutation(len(values)), -(-len(values) // batch)):
        keeper.update(places, values[places], numbered(places), numbered(places + 100))
    groups = keeper.finish(len(values))
    for group in groups:
        np.testing.assert_array_equal(group.originals, numbered(group.indices))
        np.testing.assert_array_equal(group.reconstructions, numbered(group.indices + 100))
        np.testing.assert_array_equal(group.values, values[group.indices])
    return {group.title.split()[1]: group.indices.tolist() for group in groups}


@pytest.mark.parametrize("batch", [1, 7, NUM])
def test_worst_and_best_are_those_of_the_whole_set(batch):
    values = np.random.default_rng(0).normal(size=NUM)
    order = np.argsort(values)
    low, high = order[:3].tolist(), order[::-1][:3].tolist()
    assert kept("LPIPS", values, batch=batch) == {"first": [0, 1, 2], "worst": high, "best": low}
    assert kept("PSNR", values, batch=batch) == {"first": [0, 1, 2], "worst": low, "best": high}


def test_of_equal_pairs_the_earlier_are_kept_and_few_pairs_are_all_kept():
    assert kept("PSNR", np.full(NUM, np.inf)) == {kind: [0, 1, 2] for kind in ("first", "worst", "best")}
    assert kept("LPIPS", np.array([0.5, 0.1]))["worst"] == [0, 1]


def test_kept_images_do_not_change_with_the_batch_they_came_from():
    keeper = PairKeeper(1, "PSNR")
    images = numbered(np.array([5]))
    keeper.update(np.array([0]), np.array([1.0]), images, images)
    images[:] = 0
    np.testing.assert_array_equal(keeper.finish(1)[0].originals, numbered(np.array([5])))


def test_the_sheet_has_each_reconstruction_below_its_original():
    keeper = PairKeeper(4, "LPIPS")
    keeper.update(np.arange(4), np.array([0.1, 0.2, 0.3, 0.4]), numbered(np.arange(10, 14)), numbered(np.arange(200, 204)))
    sheet = np.asarray(pair_sheet(keeper.finish(4), columns=3))
    for level in range(10, 14):
        original, reconstruction = places_of(level, sheet), places_of(level + 190, sheet)
        assert original.sum() == reconstruction.sum() == 3 * 96 * 96  # once in each of three groups
        np.testing.assert_array_equal(original[:-100], reconstruction[100:])


def test_the_sheet_of_one_pair_holds_its_title_and_large_images_are_not_enlarged():
    keeper = PairKeeper(8, "PSNR")
    keeper.update(np.array([0]), np.array([np.inf]), numbered(np.array([9]), side=120), numbered(np.array([9]), side=120))
    groups = keeper.finish(1)
    assert groups[0].title == "The first of 1 image" and groups[0].captions == ["no error"]
    sheet = np.asarray(pair_sheet(groups))
    assert places_of(9, sheet).sum() == 3 * 2 * 120 * 120
