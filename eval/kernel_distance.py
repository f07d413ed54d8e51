"""Kernel Inception Distance (Binkowski et al., arXiv:1801.01401): unbiased squared MMD of features with a polynomial or a Gaussian kernel.

Suites average it over random subsets. These overlap, so the deviation over them is no standard error; `kid_interval` gives one, from a
delete-a-block jackknife of the estimator of both whole sets.

Shapes: N generated, M reference images, D features.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from genvision.errors import UserError
from genvision.eval.confidence import MIN_BLOCKS, interval_around, jackknife_error

Variant = Literal["torch-fidelity", "clean"]
Kernel = Literal["polynomial", "rbf"]
"""(x.y / D + 1)^3, as every paper has it, or exp(-|x - y|^2 / (2 RBF_SIGMA^2))."""
RBF_SIGMA = 10.0
NUM_SUBSETS, SUBSET_SIZE = 100, 1000
SEEDS: dict[Variant, int] = {"torch-fidelity": 2020, "clean": 0}
"""clean-fid itself draws from NumPy's global state, unseeded."""
TILE = 2000
MAX_INTERVAL_IMAGES = 20_000
"""On each side; the interval looks at all pairs of images."""


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """The mean over subsets and how they were drawn."""

    mean: float
    std: float
    """Population deviation over the overlapping subsets, no standard error."""
    per_subset: np.ndarray = field(repr=False)
    num_subsets: int
    subset_size: int
    seed: int


def kernel_distance(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    variant: Variant = "torch-fidelity",
    kernel: Kernel = "polynomial",
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int | None = None,
) -> KernelDistance:
    """KID over random subsets.

    Args:
        generated: [N, D]; `reference` [M, D].
        variant: order in which the random numbers are used: `torch-fidelity` draws the generated half of a subset first, `clean` the
            reference's.
        subset_size: of each set; at most the size of the smaller one.
        seed: None takes the variant's own.

    Raises:
        UserError: fewer than 2 images on a side, or another number of features.
    """
    _check(generated, reference)
    size = min(subset_size, len(generated), len(reference))
    chosen = SEEDS[variant] if seed is None else seed
    rng = np.random.RandomState(chosen)
    values = np.empty(num_subsets)
    for i in range(num_subsets):
        if variant == "torch-fidelity":
            x = generated[rng.choice(len(generated), size, replace=False)]
            y = reference[rng.choice(len(reference), size, replace=False)]
        else:
            y = reference[rng.choice(len(reference), size, replace=False)]
            x = generated[rng.choice(len(generated), size, replace=False)]
        values[i] = mmd2(x, y, kernel)
    return KernelDistance(
        mean=float(values.mean()), std=float(values.std()), per_subset=values, num_subsets=num_subsets, subset_size=size, seed=chosen
    )


def mmd2(x: np.ndarray, y: np.ndarray, kernel: Kernel = "polynomial") -> float:
    """Unbiased squared maximum mean discrepancy of two whole sets [N, D] and [M, D], float64; may be negative."""
    n, m = len(x), len(y)
    within_x, diagonal_x = _kernel_sums(x, x, kernel)
    within_y, diagonal_y = _kernel_sums(y, y, kernel)
    between, _ = _kernel_sums(x, y, kernel)
    return float((within_x - diagonal_x) / (n * (n - 1)) + (within_y - diagonal_y) / (m * (m - 1)) - 2 * between / (n * m))


def kid_interval(generated: np.ndarray, reference: np.ndarray, block_of: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of `mmd2` of the whole sets, from leaving out each block of the generated set; the reference counts as known.

    Args:
        block_of: block of each generated image, int64 [N].

    Returns:
        None with too few blocks, or with more than MAX_INTERVAL_IMAGES images.
    """
    _check(generated, reference)
    present = np.unique(block_of)
    n, m = len(generated), len(reference)
    if len(present) < MIN_BLOCKS or n - max(np.bincount(block_of)) < 2 or max(n, m) > MAX_INTERVAL_IMAGES:
        return None
    blocks = [generated[block_of == block] for block in present]
    counts = np.array([len(block) for block in blocks])
    # kernel sums of all pairs of blocks: every set without a block is then a sum of them
    pairs = np.zeros((len(blocks), len(blocks)))
    diagonals, between = np.zeros(len(blocks)), np.zeros(len(blocks))
    for i, block in enumerate(blocks):
        for j in range(i + 1):
            pairs[i, j], diagonal = _kernel_sums(block, blocks[j])
            pairs[j, i] = pairs[i, j]
            if i == j:
                diagonals[i] = diagonal
        between[i], _ = _kernel_sums(block, reference)
    within_y, diagonal_y = _kernel_sums(reference, reference)
    constant = (within_y - diagonal_y) / (m * (m - 1))

    def estimate(kept: np.ndarray) -> float:
        count = counts[kept].sum()
        within = pairs[np.ix_(kept, kept)].sum() - diagonals[kept].sum()
        return float(within / (count * (count - 1)) + constant - 2 * between[kept].sum() / (count * m))

    everything = np.ones(len(blocks), dtype=bool)
    left_out = np.array([estimate(everything & (np.arange(len(blocks)) != i)) for i in range(len(blocks))])
    whole = estimate(everything)
    return interval_around(whole, jackknife_error(whole, left_out, counts), len(blocks))


def _kernel_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel = "polynomial") -> tuple[float, float]:
    """Sum of the kernel over all pairs, and over the pairs (i, i) where x and y are one set; tile by tile, in float64."""
    total = diagonal = 0.0
    for start in range(0, len(x), TILE):
        rows = np.asarray(x[start : start + TILE], dtype=np.float64)
        # one set with itself is symmetric: tiles right of the diagonal count twice
        for column in range(start if x is y else 0, len(y), TILE):
            on_diagonal = x is y and start == column
            # the same array on both sides lets BLAS compute one triangle only
            columns = rows if on_diagonal else np.asarray(y[column : column + TILE], dtype=np.float64)
            values = _kernel(rows, columns, kernel)
            total += float(values.sum()) * (2 if x is y and not on_diagonal else 1)
            if on_diagonal:
                diagonal += float(np.trace(values))
    return total, diagonal


def _kernel(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """[N, M], of float64 rows."""
    values: np.ndarray = x @ y.T
    if kernel == "polynomial":
        values /= x.shape[1]
        values += 1
        return values * values * values  # ten times faster than a power of 3
    values *= 2
    values -= np.square(x).sum(axis=1)[:, None]
    values -= np.square(y).sum(axis=1)
    values /= 2 * RBF_SIGMA**2
    return np.exp(values, out=values)


def _check(generated: np.ndarray, reference: np.ndarray) -> None:
    for name, rows in (("generated", generated), ("reference", reference)):
        if len(rows) < 2:
            raise UserError(f"KID needs at least 2 {name} images, got {len(rows)}; give more images")
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"features of {generated.shape[1]} and {reference.shape[1]} numbers cannot be compared; use one extractor for both sets"
        )
