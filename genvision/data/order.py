"""The order of samples as a pure function of (seed, step): no state, so a resumed run needs no replay.

Sample number p of a run (its position) lies in epoch p // N, at place p % N of that epoch's permutation of the N samples.
The order of positions does not depend on the number of processes: each takes its slice of the global batch.
Only numpy's raw bit streams are used, which never change between versions.
"""

from functools import lru_cache

import numpy as np

from genvision.errors import UserError

# every use of the seed has a stream of its own
_ORDER, _AUGMENTATION, _CHOICE, _VIEW = 1, 2, 3, 4


def sample_positions(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Positions int64 [batch_size / world_size] of one process in one step.

    Args:
        batch_size: of all processes together.

    Raises:
        UserError: the batch cannot be split evenly.
    """
    local = local_batch_size(batch_size, world_size)
    first = step * batch_size + rank * local
    return np.arange(first, first + local, dtype=np.int64)


def local_batch_size(batch_size: int, world_size: int) -> int:
    """The part of the global batch that each process handles."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size {batch_size} cannot be split over {world_size} processes; choose a multiple of {world_size}")
    return batch_size // world_size


def sample_indices(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """Which samples, int64 in [0, num_samples), stand at `positions`."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = epoch_order(seed, int(epoch), num_samples)[places[chosen]]
    return indices


def sample_index(seed: int, position: int, num_samples: int) -> int:
    """Which sample stands at one position."""
    return int(sample_indices(seed, np.array([position]), num_samples)[0])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation int64 [num_samples] of one epoch (read-only)."""
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch, _ORDER])).random_raw(num_samples)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers that belong to one position, for its crop."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, position, _AUGMENTATION])))


def view_seed(seed: int, view: int) -> int:
    """What stands for the seed in the draws of one view of an image; the first view has the seed itself."""
    return seed if view == 0 else int(np.random.SeedSequence([seed, view, _VIEW]).generate_state(1, np.uint64)[0])


def uniform_choice(seed: int, positions: np.ndarray, num_choices: int) -> np.ndarray:
    """One of `num_choices` for every position, int64, uniform and independent (SplitMix64 of seed and position)."""
    key = np.random.SeedSequence([seed, _CHOICE]).generate_state(1, np.uint64)
    z = key + (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (((z >> np.uint64(32)) * np.uint64(num_choices)) >> np.uint64(32)).astype(np.int64)
