"""How sure a score is: delete-a-block jackknife intervals, the bias of FID, and FID extrapolated to infinitely many images.

The images of the generated set are cut into blocks at random; a score is computed again without each block in turn, and the spread of these
scores gives its standard error (Busing, Meijer, van der Leeden 1999, for blocks of unequal size). A bootstrap would not do: images that
are drawn twice make a covariance too small and FID too high. The reference counts as known.

Shapes: N images in g blocks, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student_t

from genvision.eval.moments import Gaussian, Moments, frechet_distance, merged, without

LEVEL = 0.95
MIN_BLOCKS = 5
"""Fewer blocks than this give no useful interval."""
NUM_PARTS = (2, 5, 10)
MIN_IMAGES_PER_FEATURE = 2.4
"""5,000 images for the 2048 features of Inception: smaller parts bend the line."""
METHOD = "95 %, delete-a-block jackknife over {blocks} random blocks of the generated set, Student's t"


@dataclass(frozen=True, kw_only=True)
class FrechetConfidence:
    """A Frechet distance with what is known of its error."""

    distance: float
    """Of all N images."""
    interval: tuple[float, float] | None = None
    """For the distance of N images; None with too few blocks."""
    bias: float | None = None
    """c / N: how much higher it reads than for infinitely many images, to second order."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(number of images, mean distance of disjoint parts of so many images), growing, the whole set last."""
    infinity: float | None = None
    """Where the line of these distances against 1 / N meets 0; None if the set is too small for a line."""
    infinity_interval: tuple[float, float] | None = None
    num_blocks: int = 0


def frechet_confidence(blocks: Sequence[Moments], reference: Gaussian, *, extrapolate: bool = False) -> FrechetConfidence:
    """The distance of a set to a reference, with its interval.

    Args:
        blocks: moments of disjoint random parts of the set; empty ones are left out.
        extrapolate: also draw the curve and extrapolate, which takes 17 more distances.

    Raises:
        UserError: fewer than 2 images.
    """
    blocks = [block for block in blocks if block.count > 0]
    total = merged(blocks) if blocks else Moments(len(reference.mu))
    distance = frechet_distance(total, reference)
    bias = reference.bias / total.count
    if len(blocks) < MIN_BLOCKS or total.count - max(block.count for block in blocks) < 2:
        return FrechetConfidence(distance=distance, bias=bias, num_blocks=len(blocks))
    left_out = np.array([frechet_distance(without(total, block), reference) for block in blocks])
    counts = np.array([block.count for block in blocks])
    # a smaller set reads higher by c / n: take that away, or the jackknife would call the difference noise where blocks differ in size
    levelled = left_out - reference.bias * (1 / (total.count - counts) - 1 / total.count)
    error = jackknife_error(distance, levelled, counts)
    interval = interval_around(distance, error, len(blocks))
    curve, infinity = extrapolate_distance(blocks, reference, distance) if extrapolate else ([], None)
    return FrechetConfidence(
        distance=distance,
        interval=interval,
        bias=bias,
        curve=curve,
        infinity=infinity,
        infinity_interval=interval_around(infinity, error, len(blocks)) if infinity is not None else None,
        num_blocks=len(blocks),
    )


def paired_interval(first: Sequence[Moments], second: Sequence[Moments], distance: float) -> tuple[float, float] | None:
    """95 % interval of the distance between two sets of pairs (images and their reconstructions), leaving out blocks of pairs.

    Args:
        first: moments of blocks; `second` of the same blocks of the other side.
        distance: of the whole sets.

    Returns:
        None with too few blocks.
    """
    present = [i for i, block in enumerate(first) if block.count > 0]
    counts = np.array([first[i].count for i in present])
    if len(present) < MIN_BLOCKS or counts.sum() - counts.max() < 2:
        return None
    left_out = [frechet_distance(*(merged([side[i] for i in present if i != without]) for side in (first, second))) for without in present]
    return interval_around(distance, jackknife_error(distance, np.array(left_out), counts), len(present))


def extrapolate_distance(blocks: Sequence[Moments], reference: Gaussian, distance: float) -> tuple[list[tuple[int, float]], float | None]:
    """The curve of distances against the number of images, and its extrapolation to infinitely many (arXiv:1911.07023).

    The set is cut into 2, 5 and 10 disjoint parts. The mean distance of k parts, weighted by their size, has the first-order noise of the
    whole set's distance but k times its bias, so that the differences show the bias almost without noise.

    Args:
        blocks: non-empty.
        distance: of the whole set.

    Returns:
        Points (images of a part, mean distance), growing; and the value at infinity, None if parts of MIN_IMAGES_PER_FEATURE images for
        each feature do not even make halves.
    """
    total = sum(block.count for block in blocks)
    points = [(1, distance)]
    for num_parts in NUM_PARTS:
        if num_parts > len(blocks):
            continue
        parts = [merged(list(blocks[i::num_parts])) for i in range(num_parts)]
        if min(part.count for part in parts) < 2:
            continue
        points.append((num_parts, sum(part.count / total * frechet_distance(part, reference) for part in parts)))
    curve = [(round(total / num_parts), value) for num_parts, value in reversed(points)]
    needed = MIN_IMAGES_PER_FEATURE * len(reference.mu)
    fitted = np.array([(num_parts / total, value) for num_parts, value in points if total / num_parts >= needed])
    if len(fitted) < 2:
        return curve, None
    # a straight line by least squares; small parts bend it, so they weigh less
    weights = 1 / np.sqrt(fitted[:, 0])
    _, intercept = np.polyfit(fitted[:, 0], fitted[:, 1], 1, w=weights)
    return curve, float(intercept)


def jackknife_error(whole: float, left_out: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of a score by the delete-a-block jackknife with blocks of unequal size.

    Args:
        whole: the score of all images.
        left_out: [g], the score without each block.
        counts: [g], images of each block.
    """
    h = counts.sum() / counts
    pseudo = h * whole - (h - 1) * left_out
    centre = len(counts) * whole - ((1 - 1 / h) * left_out).sum()
    return float(np.sqrt(((pseudo - centre) ** 2 / (h - 1)).sum() / len(counts)))


def mean_interval(values: np.ndarray, block_of: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of one number an image (is it inside the manifold, was it recognised), [N], by its blocks [N]."""
    present = np.unique(block_of)
    if len(present) < MIN_BLOCKS:
        return None
    counts = np.array([(block_of == block).sum() for block in present])
    sums = np.array([values[block_of == block].sum() for block in present], dtype=np.float64)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    whole = float(sums.sum() / counts.sum())
    low, high = interval_around(whole, jackknife_error(whole, left_out, counts), len(present))
    return (max(low, 0.0), min(high, 1.0)) if values.dtype == bool else (low, high)


def interval_around(value: float, error: float, num_blocks: int) -> tuple[float, float]:
    """95 % interval from a jackknife error of so many blocks."""
    half = float(student_t.ppf((1 + LEVEL) / 2, num_blocks - 1)) * error
    return value - half, value + half


def method(num_blocks: int) -> str:
    """How intervals were computed, for the result file."""
    return METHOD.format(blocks=num_blocks)
