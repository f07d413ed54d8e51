"""What is wrong with a set of images before any score is: duplicates, an order by class, too few of them, traces of JPEG.

Shapes: N images, K classes; hashes uint8 [N, 16].
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256

import numpy as np
from PIL import Image

ENOUGH_IMAGES = 10_000
JPEG_SAMPLE = 200
"""Images that are looked at for traces of JPEG."""
MIN_JPEG_SAMPLE, MIN_JPEG_SIDE = 20, 32
JPEG_DEVIATIONS = 5.0
"""Standard errors above 0. Of 100 photographs of 256 pixels, those never stored as JPEG reach 1, at quality 90 they reach 7."""
SORTED_DEVIATIONS = 8.0


def hash_images(images: np.ndarray) -> np.ndarray:
    """Identity of each image's pixels, whatever its file, format or place: uint8 [N, H, W, 3] -> uint8 [N, 16]."""
    digests = [blake2b(np.ascontiguousarray(image).data, digest_size=16, key=str(image.shape).encode()).digest() for image in images]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 16)


def hash_of_set(hashes: np.ndarray) -> str:
    """sha256 of a set of images; their order does not matter, how often each occurs does."""
    return sha256(b"".join(sorted(row.tobytes() for row in hashes))).hexdigest()


def count_duplicates(hashes: np.ndarray) -> int:
    """Images that equal an earlier one in every pixel."""
    return len(hashes) - len(np.unique(hashes, axis=0)) if len(hashes) else 0


def duplicate_warning(hashes: np.ndarray, numbers: np.ndarray | None = None) -> str | None:
    """One line if images are identical, with up to three pairs of them.

    Args:
        numbers: what the user calls each image, int64 [N]; its place in the set unless told.
    """
    number = count_duplicates(hashes)
    if not number:
        return None
    first: dict[bytes, int] = {}
    pairs: list[str] = []
    for i, row in enumerate(hashes):
        name = i if numbers is None else int(numbers[i])
        earlier = first.setdefault(row.tobytes(), name)
        if earlier != name and len(pairs) < 3:
            pairs.append(f"{min(earlier, name)} and {max(earlier, name)}")
    named = ", ".join(pairs) + (", ..." if number > len(pairs) else "")
    return (
        f"{number:,} of {len(hashes):,} generated images are identical to another one (images {named}): were seeds used twice, or has the "
        "model collapsed?"
    )


def count_warning(num_images: int, which: str, feature_dim: int) -> str | None:
    """One line if a set is so small that FID is mostly bias or noise."""
    if num_images < feature_dim:
        return (
            f"{which} has {num_images:,} images, fewer than the {feature_dim:,} features: FID is mostly bias; "
            "compare it only with sets of the same size, or use KID"
        )
    if feature_dim >= 1000 and num_images < ENOUGH_IMAGES:
        return f"{which} has {num_images:,} images: FID is biased upwards below {ENOUGH_IMAGES:,}; published values take 50,000"
    return None


def order_warning(labels: np.ndarray | None, logits: np.ndarray | None) -> str | None:
    """One line if the images look sorted by class, which ruins every Inception Score that does not shuffle.

    Args:
        labels: int64 [N], or None if there are none that mean anything.
        logits: float [N, K] in the order of the images.
    """
    mend = "put them in a random order; FID does not depend on it, the Inception Score does"
    if labels is not None and len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all()):
        return f"the generated images are sorted by class: {mend}"
    if logits is None or len(logits) < 50:
        return None
    classes = np.asarray(logits).argmax(axis=1)
    by_chance = float(np.square(np.bincount(classes) / len(classes)).sum())
    seen = float((classes[1:] == classes[:-1]).mean())
    error = np.sqrt(by_chance * (1 - by_chance) / (len(classes) - 1))
    if by_chance < 0.5 and seen > by_chance + max(0.2, SORTED_DEVIATIONS * error):
        return f"the generated images look sorted by class ({seen:.0%} of neighbours show one class, by chance {by_chance:.0%}): {mend}"
    return None


def format_warning(formats: Mapping[str, int]) -> str | None:
    """One line if generated images are stored as JPEG."""
    number = formats.get("JPEG", 0)
    if not number:
        return None
    total = sum(formats.values())
    return f"{number:,} of {total:,} generated images are JPEG files: compression moves FID by whole points; save them as PNG or npz"


def jpeg_warning(images: Sequence[np.ndarray]) -> str | None:
    """One line if images that are no JPEG files look as if they once were: blocks of 8x8 pixels stand out.

    Args:
        images: uint8 [H, W, 3], some tens of them.
    """
    usable = [image for image in images if min(image.shape[:2]) >= MIN_JPEG_SIDE]
    if len(usable) < MIN_JPEG_SAMPLE:
        return None
    values = np.array([blockiness(image) for image in usable])
    deviations = values.mean() / (values.std(ddof=1) / np.sqrt(len(values)) + 1e-12)
    if deviations < JPEG_DEVIATIONS or values.mean() < 0.02:
        return None
    return (
        f"blocks of 8x8 pixels stand out in the generated images ({deviations:.0f} standard errors): they look as if they had been JPEG "
        "files, or the decoder leaves a grid; JPEG moves FID by whole points, save PNG or npz"
    )


def blockiness(image: np.ndarray) -> float:
    """How much more neighbouring pixels differ across the borders of an 8x8 grid than elsewhere, relative to their difference.

    Args:
        image: uint8 [H, W, 3]. About 0 for images that never were JPEG files of this size, 0.07 at quality 90, 0.2 at 75.
    """
    gray = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float64)
    return float(np.mean([_excess_at_borders(gray), _excess_at_borders(gray.T)]))


def _excess_at_borders(gray: np.ndarray) -> float:
    steps = np.abs(np.diff(gray, axis=1)).mean(axis=0)
    excess = steps[1:-1] - 0.5 * (steps[:-2] + steps[2:])  # against both neighbours, so that slow changes do not count
    place = np.arange(1, len(steps) - 1) % 8
    others = np.mean([excess[place == offset].mean() for offset in range(7)])
    return float((excess[place == 7].mean() - others) / (steps.mean() + 1e-9))


def score_hint(scores: Mapping[str, object], num_classes: int) -> str | None:
    """One line where FID says good and the Inception Score says bad, which one set can hardly be."""
    fid, score = scores.get("fid"), scores.get("inception_score")
    if isinstance(fid, float) and isinstance(score, float) and fid < 5 and score < 100 and num_classes >= 1000:
        return f"FID {fid:.2f} is good, but an Inception Score of {score:.0f} is not: the images are probably sorted by class"
    return None
