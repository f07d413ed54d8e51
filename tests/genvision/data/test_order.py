"""The order of samples is a function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genvision.data.order import epoch_order, sample_index, sample_indices, sample_positions, sample_rng, uniform_choice, view_seed
from genvision.errors import UserError

EXPECTED_ORDER = [4, 7, 6, 1, 2, 0, 5, 3]
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


def test_a_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 8)[0] = 1


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
