"""The order of samples is a function of (seed, step)."""

import hashlib
import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genvision.data import order
from genvision.data.order import (
    LARGE_SET_WINDOW,
    TURNS,
    MixtureOrder,
    SampleOrder,
    epoch_order,
    part_seed,
    sample_index,
    sample_indices,
    sample_positions,
    sample_rng,
    uniform_choice,
    view_seed,
)
from genvision.errors import UserError

EXPECTED_ORDER = [4, 7, 6, 1, 2, 0, 5, 3]
EXPECTED_HASHES = {(1797, 0, 3): "d764b2eff78cf181", (100_000, 7, 0): "58a9965f49be450d"}
"""Of the order of (samples, seed, epoch) as it was before there were windows."""
EXPECTED_LARGE = [7, 11, 6, 9, 12, 13, 5, 10, 14, 8, 21, 22, 20, 24, 18, 19, 23, 15, 16, 17, 25, 0, 2, 28, 27, 3, 4, 1, 29, 26]
EXPECTED_MIXED = [24, 43, 40, 52, 45, 50, 23, 57, 37, 30, 36, 58, 41, 59, 53, 38, 32, 14, 49, 33, 21, 47, 34, 55, 51, 44, 54, 31, 48, 39]
EXPECTED_VIEW_SEED = 15482575200724226366
EXPECTED_CHOICE = [3, 2, 5, 8, 4, 4, 7, 7]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), num=st.integers(1, 300))
def test_every_epoch_is_a_permutation(seed, epoch, num):
    indices = sample_indices(seed, epoch * num + np.arange(num), num)
    assert sorted(indices.tolist()) == list(range(num))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 100), step=st.integers(0, 500), per_rank=st.integers(1, 9), world_size=st.integers(1, 6), num=st.integers(1, 50))
def test_global_order_does_not_depend_on_the_number_of_processes(seed, step, per_rank, world_size, num):
    batch_size = per_rank * world_size
    whole = sample_positions(step, batch_size)
    parts = [sample_positions(step, batch_size, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert sample_indices(seed, whole, num).tolist() == [sample_index(seed, int(p), num) for p in whole]


def test_steps_follow_each_other_without_a_gap():
    positions = np.concatenate([sample_positions(step, 6) for step in range(5)])
    np.testing.assert_array_equal(positions, np.arange(30))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_order(seed, epoch, 100).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_never_changes_between_versions():
    assert epoch_order(0, 0, 8).tolist() == EXPECTED_ORDER
    assert uniform_choice(0, np.arange(8), 10).tolist() == EXPECTED_CHOICE
    assert view_seed(0, 1) == EXPECTED_VIEW_SEED


@pytest.mark.parametrize("case", EXPECTED_HASHES)
def test_a_set_that_fits_into_a_window_keeps_the_order_of_former_versions(case):
    num, seed, epoch = case
    indices = SampleOrder(num).indices(seed, epoch * num + np.arange(num))
    assert hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16] == EXPECTED_HASHES[case]
    np.testing.assert_array_equal(epoch_order(seed, epoch, num), indices)


def test_large_sets_and_mixtures_keep_their_order_too():
    large = SampleOrder(30, window=12, block=5)
    assert large.indices(0, np.arange(30)).tolist() == EXPECTED_LARGE
    assert MixtureOrder((large, SampleOrder(30)), (1, 2)).indices(0, np.arange(30)).tolist() == EXPECTED_MIXED


class TestWindows:
    @settings(deadline=None, max_examples=80)
    @given(
        num=st.integers(1, 300), window=st.integers(1, 90), block=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000)
    )
    def test_every_epoch_is_a_permutation_whatever_the_sizes(self, num, window, block, seed, epoch):
        indices = SampleOrder(num, window, block).indices(seed, epoch * num + np.arange(num))
        assert sorted(indices.tolist()) == list(range(num))

    @settings(deadline=None, max_examples=40)
    @given(num=st.integers(1, 120), window=st.integers(1, 50), block=st.integers(1, 20), first=st.integers(0, 500), data=st.data())
    def test_a_position_has_its_sample_whatever_is_asked_beside_it(self, num, window, block, first, data):
        order = SampleOrder(num, window, block)
        whole = order.indices(3, first + np.arange(60))
        chosen = np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=20)))
        np.testing.assert_array_equal(order.indices(3, first + chosen), whole[chosen])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).indices(3, first + chosen), whole[chosen])

    def test_a_window_mixes_blocks_from_everywhere_and_no_others(self):
        order = SampleOrder(100_000, window=10_000, block=100)
        epochs = order.indices(0, np.arange(200_000)).reshape(2, 10, 10_000)
        blocks = epochs // 100
        assert all(len(np.unique(window)) == 100 for window in blocks.reshape(20, -1))
        assert all(len(np.unique(window // 100)) == 10 for window in blocks[0])  # of each tenth of the set some
        assert len(set(np.unique(blocks[0, 0])) & set(np.unique(blocks[1, 0]))) < 30  # of 100; 10 are expected
        assert abs(np.corrcoef(epochs[0, 0], np.arange(10_000))[0, 1]) < 0.04
        neighbours = np.abs(np.diff(epochs[0, 0])) == 1
        assert neighbours.mean() < 0.002

    def test_windows_are_about_equally_long(self):
        starts = [SampleOrder(4100, window=1000, block=100)._epoch(0, 0)._start(window) for window in range(5)]
        assert np.diff([*starts, 4100]).min() >= 800

    def test_a_large_set_has_smaller_windows_by_itself(self, monkeypatch):
        monkeypatch.setattr(order, "WINDOW", 1000)
        monkeypatch.setattr(order, "LARGE_SET_WINDOW", 250)
        assert SampleOrder(1000)._epoch(0, 0).num_windows == 1
        assert SampleOrder(1001)._epoch(0, 0).num_windows == 5
        assert SampleOrder(1001, window=2000)._epoch(0, 0).num_windows == 1

    def test_a_large_set_costs_the_memory_of_its_windows_and_little_time(self):
        order = SampleOrder(1_000_000_000)
        tracemalloc.start()
        order.indices(0, np.arange(256) + 7_000_000)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        num_blocks = 1_000_000_000 // order.block
        assert kept < 1.1 * 4 * (LARGE_SET_WINDOW + num_blocks)
        assert peak < 36 * LARGE_SET_WINDOW
        began = time.perf_counter()
        for batch in range(100):
            order.indices(0, np.arange(256) + 7_000_000 + 256 * batch)
        assert time.perf_counter() - began < 0.5

    def test_a_window_of_nothing_is_refused(self):
        with pytest.raises(UserError, match=r"data\.shuffle_window must be at least 1, got 0"):
            SampleOrder(5, window=0)


class TestMixtures:
    def test_every_part_has_exactly_its_share_of_every_round(self):
        order = MixtureOrder((SampleOrder(50), SampleOrder(7), SampleOrder(3000)), (0.5, 0.2, 0.3))
        assert order.shares == (5000, 2000, 3000)
        for start in (0, 3 * TURNS):
            parts, _ = order.places(0, start + np.arange(TURNS))
            assert tuple(np.bincount(parts)) == order.shares
            for few in parts.reshape(10, -1):  # in parts of a round by chance: 1000 draws of each
                assert (abs(np.bincount(few) - np.array([500, 200, 300])) < 60).all()
        assert (order.places(0, np.arange(TURNS))[0] != order.places(0, TURNS + np.arange(TURNS))[0]).any()
        assert (order.places(1, np.arange(TURNS))[0] != order.places(0, np.arange(TURNS))[0]).any()

    @settings(deadline=None, max_examples=60)
    @given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6))
    def test_shares_are_the_weights_to_the_next_whole_number(self, weights):
        shares = np.array(MixtureOrder((SampleOrder(1),) * len(weights), tuple(weights)).shares)
        assert shares.sum() == TURNS
        assert (abs(shares - np.array(weights) / sum(weights) * TURNS) < 1).all()

    def test_every_part_goes_through_epochs_of_its_own(self):
        order = MixtureOrder((SampleOrder(40, window=20, block=6), SampleOrder(1000)), (1, 3))
        indices = order.indices(5, np.arange(3 * TURNS))
        small = indices[indices < 40]
        assert len(small) == 7500
        for epoch in small[: 187 * 40].reshape(-1, 40):
            assert sorted(epoch.tolist()) == list(range(40))
        large = indices[indices >= 40] - 40
        for epoch in large[:22_000].reshape(-1, 1000):
            assert sorted(epoch.tolist()) == list(range(1000))
        np.testing.assert_array_equal(small[:80], order.orders[0].indices(part_seed(5, 0), np.arange(80)))

    def test_a_position_has_its_sample_whatever_is_asked_beside_it(self):
        order = MixtureOrder((SampleOrder(40), SampleOrder(60)), (0.3, 0.7))
        positions = np.arange(TURNS - 50, TURNS + 50)
        whole = order.indices(0, positions)
        assert [int(order.indices(0, np.array([p]))[0]) for p in positions] == whole.tolist()
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).indices(0, positions[::-1]), whole[::-1])

    def test_parts_of_one_length_do_not_go_in_step(self):
        order = MixtureOrder((SampleOrder(1000), SampleOrder(1000)), (1, 1))
        indices = order.indices(0, np.arange(1000))
        first, second = indices[indices < 1000], indices[indices >= 1000] - 1000
        assert np.mean(first[:400] == second[:400]) < 0.02


def test_what_is_done_with_an_order_does_not_change_it():
    epoch_order(0, 0, 8)[:] = 0
    assert epoch_order(0, 0, 8).tolist() == EXPECTED_ORDER


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match=r"batch_size 10.*3 processes.*multiple of 3"):
        sample_positions(0, 10, 0, 3)


def test_choices_are_uniform_and_belong_to_the_position():
    choices = uniform_choice(3, np.arange(20_000), 10)
    counts = np.bincount(choices, minlength=10)
    assert choices.min() == 0
    assert choices.max() == 9
    assert abs(counts - 2000).max() < 200
    np.testing.assert_array_equal(uniform_choice(3, np.array([7, 19_999]), 10), choices[[7, 19_999]])
    repeats = np.mean(choices[1:] == choices[:-1])
    assert abs(repeats - 0.1) < 0.01
    assert (uniform_choice(4, np.arange(100), 10) != choices[:100]).any()


def test_positions_have_random_numbers_of_their_own():
    draws = {sample_rng(seed, position).integers(2**60) for seed in range(3) for position in range(3)}
    assert len(draws) == 9
    assert sample_rng(1, 2).integers(2**60) == sample_rng(1, 2).integers(2**60)


def test_the_first_view_has_the_seed_itself_and_the_others_seeds_of_their_own():
    seeds = [view_seed(seed, view) for seed in range(3) for view in range(3)]
    assert seeds[::3] == [0, 1, 2] and len(set(seeds)) == 9
