"""The order of samples as a pure function of (seed, step): no state, so a resumed run needs no replay.

Sample number p of a run (its position) lies in epoch p // N, at place p % N of that epoch's permutation of the N samples.
The order of positions does not depend on the number of processes: each takes its slice of the global batch.
A large set is permuted in windows, in bounded memory; a mixture goes through each of its parts in epochs of that part's own.
Only numpy's raw bit streams are used, which never change between versions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from genvision.errors import UserError

# every use of the seed has a stream of its own
_ORDER, _AUGMENTATION, _CHOICE, _VIEW, _BLOCKS, _WINDOWS, _PART, _TURNS = range(1, 9)
WINDOW = 1 << 22
"""Sets of up to this many samples are shuffled as a whole."""
LARGE_SET_WINDOW = 1 << 20
"""The window of larger sets."""
BLOCK = 1 << 10
TURNS = 10_000
"""Consecutive positions of a mixture in which every part has exactly its share."""


class Order(Protocol):
    """Which samples are visited when."""

    @property
    def num_samples(self) -> int: ...

    def indices(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """The samples, int64 in [0, num_samples), that stand at `positions`."""


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
    """Which samples, int64 in [0, num_samples), stand at `positions`, if they are shuffled as a whole."""
    return _whole_order(num_samples).indices(seed, positions)


def sample_index(seed: int, position: int, num_samples: int) -> int:
    """Which sample stands at one position."""
    return int(sample_indices(seed, np.array([position]), num_samples)[0])


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation int64 [num_samples] of one epoch."""
    return sample_indices(seed, epoch * num_samples + np.arange(num_samples), num_samples)


@dataclass(frozen=True)
class SampleOrder:
    """Every epoch is a permutation of all samples.

    A set that fits into the window is permuted as a whole. A larger one is cut into blocks of consecutive samples; each epoch permutes the
    blocks, consecutive blocks fill a window, and the samples of a window are permuted among each other. So for a while reading stays
    within window / block stretches of the data, and memory is bounded: 4 bytes for each sample of two windows and each block of two
    epochs (8 bytes beyond 2^31 samples), and 24 bytes for each sample of a window while it is made.
    """

    num_samples: int
    window: int | None = None
    """Samples that are permuted among each other; None: all of up to WINDOW samples, LARGE_SET_WINDOW of a larger set."""
    block: int = BLOCK
    """Consecutive samples that stay together in a window; at most a window of them."""
    _epoch: "Callable[[int, int], _Epoch]" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"data.shuffle_window must be at least 1, got {self.window}; leave it out for the default")
        window = self.window or (WINDOW if self.num_samples <= WINDOW else LARGE_SET_WINDOW)
        # each order has a cache of its own: the parts of a mixture must not drive out one another's windows
        epoch = lru_cache(maxsize=2)(partial(_Epoch, self.num_samples, window, min(self.block, window)))
        object.__setattr__(self, "_epoch", epoch)

    def indices(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """The samples, int64 in [0, num_samples), that stand at `positions`; those of a few epochs and windows at once are cheap."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        return _in_groups(epochs, places, lambda epoch, places: self._epoch(seed, epoch).indices(places))

    def __reduce__(self) -> Any:
        return SampleOrder, (self.num_samples, self.window, self.block)


class _Epoch:
    """The permutation of one epoch, window by window; the last window is kept."""

    def __init__(self, num_samples: int, window: int, block: int, seed: int, epoch: int) -> None:
        self.num_samples, self.block, self.key = num_samples, block, (seed, epoch)
        self.dtype = np.dtype(np.int32 if num_samples <= 1 << 31 else np.int64)
        self._kept: tuple[int, np.ndarray] | None = None
        self.num_windows = 1
        if num_samples > window:
            num_blocks = -(-num_samples // block)
            self.num_windows = -(-num_blocks // (window // block))
            self.blocks = _permutation(num_blocks, (seed, epoch, _BLOCKS)).astype(self.dtype)
            last = int(np.flatnonzero(self.blocks == num_blocks - 1)[0])
            self.missing = num_blocks * block - num_samples  # samples of the last block, which is shorter,
            self.missing_from = (last + 1) * block - self.missing  # and the place where they would stand

    def indices(self, places: np.ndarray) -> np.ndarray:
        """The samples at some places of this epoch."""
        if self.num_windows == 1:
            return self._samples(0)[places]
        filled = places + self.missing * (places >= self.missing_from)  # where they stood if all blocks were full
        windows = filled // self.block * self.num_windows // len(self.blocks)
        return _in_groups(windows, places, lambda window, places: self._samples(window)[places - self._start(window)])

    def _samples(self, window: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != window:
            self._kept = None  # frees the old one before there is a new one
            self._kept = window, (self._whole() if self.num_windows == 1 else self._part(window))
        return self._kept[1]

    def _whole(self) -> np.ndarray:
        return _permutation(self.num_samples, (*self.key, _ORDER)).astype(self.dtype)

    def _part(self, window: int) -> np.ndarray:
        blocks = self.blocks[self._first_block(window) : self._first_block(window + 1)].astype(np.int64)
        samples = (blocks[:, None] * self.block + np.arange(self.block)).astype(self.dtype).ravel()
        samples = samples[samples < self.num_samples]
        return samples[_permutation(len(samples), (*self.key, _WINDOWS, window))]

    def _first_block(self, window: int) -> int:
        # not `window // block` blocks in each: the last would hold what remains, a few hundred neighbours perhaps
        return -(-window * len(self.blocks) // self.num_windows)

    def _start(self, window: int) -> int:
        """The place of its first sample."""
        start = self._first_block(window) * self.block
        return start - self.missing * (start > self.missing_from)


@dataclass(frozen=True)
class MixtureOrder:
    """Parts in turns at random: of every TURNS positions each part has its share, and each part goes on in epochs of its own."""

    orders: tuple[Order, ...]
    """Of the parts; an index into the mixture is one into all of them behind each other."""
    weights: tuple[float, ...]
    """How often the parts are seen, up to a common factor."""

    @property
    def num_samples(self) -> int:
        return sum(order.num_samples for order in self.orders)

    @property
    def shares(self) -> tuple[int, ...]:
        """Of TURNS positions, by the largest remainder."""
        exact = np.array(self.weights, dtype=np.float64) / sum(self.weights) * TURNS
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: TURNS - shares.sum()]] += 1
        return tuple(shares.tolist())

    def indices(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """The samples, int64 in [0, num_samples), that stand at `positions`."""
        parts, own_positions = self.places(seed, positions)
        starts = np.cumsum([0, *(order.num_samples for order in self.orders)])
        return _in_groups(parts, own_positions, lambda part, own: starts[part] + self.orders[part].indices(part_seed(seed, part), own))

    def places(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which part's turn it is at `positions`, and the position in that part's own order, both int64."""
        shares = self.shares
        rounds, turns = np.divmod(np.asarray(positions, dtype=np.int64), TURNS)
        parts, own = np.empty_like(turns), np.empty_like(turns)
        for number in np.unique(rounds).tolist():
            chosen = rounds == number
            whose, which = _turns(seed, number, shares)
            parts[chosen], own[chosen] = whose[turns[chosen]], which[turns[chosen]]
        return parts, rounds * np.array(shares)[parts] + own


def part_seed(seed: int, part: int) -> int:
    """What stands for the seed in the order of one part of a mixture: parts of one length must not go in step."""
    return int(np.random.SeedSequence([seed, part, _PART]).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=8)
def _turns(seed: int, number: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn it is, and how many turns that part had before, in one round of TURNS."""
    whose = np.repeat(np.arange(len(shares)), shares)[_permutation(TURNS, (seed, number, _TURNS))]
    which = np.empty_like(whose)
    for part, share in enumerate(shares):
        which[whose == part] = np.arange(share)
    return whose, which


def _in_groups(groups: np.ndarray, places: np.ndarray, function: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """function(group, places of that group), put back where the places stood, int64."""
    values = np.empty_like(places)
    for group in np.unique(groups).tolist():
        chosen = groups == group
        values[chosen] = function(group, places[chosen])
    return values


def _permutation(num: int, key: tuple[int, ...]) -> np.ndarray:
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(num), kind="stable")


@lru_cache(maxsize=4)
def _whole_order(num_samples: int) -> SampleOrder:
    return SampleOrder(num_samples, window=num_samples)


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
