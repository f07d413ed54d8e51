"""From what a pass over a set found to its scores, with their intervals: all metrics of a protocol in one place.

Only the main process computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genvision.eval.confidence import FrechetConfidence, frechet_confidence, mean_interval, method
from genvision.eval.inception_score import InceptionScore, inception_score
from genvision.eval.kernel_distance import kernel_distance, kid_interval
from genvision.eval.manifold import Manifold, precision_recall
from genvision.eval.measurement import Measured
from genvision.eval.moments import Moments, frechet_distance
from genvision.eval.protocols import Protocol
from genvision.eval.reference import GAUSSIAN_OF, Reference

IMAGES_PER_FEATURE = 2
"""FID of a class is computed where both sides have so many images of it for each feature."""
NUM_NEIGHBOURS = 3
MAX_COMPARED = 10_000
"""Images on each side up to which precision and recall are computed in both arithmetics."""
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What a set consists of, as far as the scores and the result file need it."""

    name: str
    content_hash: str
    labels: np.ndarray = field(repr=False)
    """int64 [N]"""
    label_names: Sequence[str] = field(repr=False)
    label_law: str
    """`balanced`, `random`, ... in words, for the result file."""
    image_size: int
    crop: str
    formats: dict[str, int]
    """How the images are stored: format to count."""
    order: str
    """In words: as stored, or permuted."""
    numbers: np.ndarray | None = field(default=None, repr=False)
    """int64 [N]: the number by which the user knows each image; None: its place in the set."""
    some_images: Sequence[np.ndarray] = field(default=(), repr=False)
    """Tens of images, uint8 [H, W, 3], to be looked at for traces of JPEG."""


def score_set(
    measured: Measured, reference: Reference | None, protocol: Protocol, metrics: Sequence[str], facts: SetFacts, device: str = "cpu"
) -> Fields:
    """Fields of the result for all metrics asked for.

    Args:
        device: where precision and recall compare all pairs of images.
    """
    found: Fields = {"order_sensitive": [], "notes": []}
    for metric in metrics:
        if metric in GAUSSIAN_OF:
            assert reference is not None
            _frechet(found, metric, measured, reference)
    if "is" in metrics:
        _inception_score(found, measured.rows["logits"], protocol)
    members: np.ndarray | None = None
    if "pr" in metrics:
        assert reference is not None
        members = _precision_recall(found, measured, reference, protocol, device)
    if "kid" in metrics:
        assert reference is not None
        _kernel_distance(found, measured, reference, protocol)
    recognised: np.ndarray | None = None
    if "class_accuracy" in metrics:
        recognised = measured.rows["judged"] == digit_labels(facts)
        found["class_accuracy"] = float(recognised.mean())
        found["class_accuracy_interval"] = mean_interval(recognised, measured.block_of)
    if any(key.endswith("_interval") and value is not None for key, value in found.items()):
        found["interval_method"] = method(len(np.unique(measured.block_of)))
    found["per_class"] = _per_class(measured, reference, metrics, facts, members, recognised)
    return found


def digit_labels(facts: SetFacts) -> np.ndarray:
    """The digit that each image should show, int64 [N]."""
    digits: np.ndarray = np.array([int(name) for name in facts.label_names], dtype=np.int64)[facts.labels]
    return digits


def _frechet(found: Fields, metric: str, measured: Measured, reference: Reference) -> None:
    rows = GAUSSIAN_OF[metric]
    confidence: FrechetConfidence = frechet_confidence(measured.blocks[rows], reference.statistics[rows], extrapolate=metric == "fid")
    found[metric] = confidence.distance
    found[f"{metric}_interval"] = confidence.interval
    if metric == "fid":
        found["fid_bias"] = confidence.bias
        found["fid_debiased"] = None if confidence.bias is None else confidence.distance - confidence.bias
        found["fid_infinity"] = confidence.infinity
        found["fid_infinity_interval"] = confidence.infinity_interval
        found["fid_curve"] = confidence.curve or None


def _inception_score(found: Fields, logits: np.ndarray, protocol: Protocol) -> None:
    score = inception_score(logits, protocol.score_estimator)
    found |= {
        "inception_score": score.mean,
        "inception_score_std": score.std,
        "is_estimator": score.estimator,
        "is_splits": score.num_splits,
        "is_block_size": score.block_size,
        "is_shuffle_seed": score.shuffle_seed,
    }
    found["order_sensitive"].append("inception_score")
    others: list[InceptionScore] = [
        inception_score(logits, estimator)
        for estimator in ("adm", "torch-fidelity", "first-is")
        if estimator != protocol.score_estimator and (estimator == "adm" or len(logits) >= 10)
    ]
    names = {
        "adm": "ADM's blocks of 5,000",
        "torch-fidelity": "torch-fidelity's 10 shuffled parts",
        "first-is": "10 parts in the given order",
    }
    listed = ", ".join(f"{names[other.estimator]} {other.mean:.4f} ({other.mean - score.mean:+.4f})" for other in others)
    if listed:
        found["notes"].append(f"Inception Score by other estimators, from the same logits: {listed}; smaller parts score lower")


def _precision_recall(found: Fields, measured: Measured, reference: Reference, protocol: Protocol, device: str) -> np.ndarray:
    assert reference.features is not None
    manifold = precision_recall(measured.rows["pool"], reference.features, k=NUM_NEIGHBOURS, mode=protocol.neighbour_mode, device=device)
    if protocol.neighbour_mode == "adm":
        found["notes"].append(_other_arithmetic(manifold, measured.rows["pool"], reference.features, device))
    precision, recall = manifold.precision, manifold.recall
    found |= {
        "precision": precision,
        "recall": recall,
        "f_score": 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0,
        "precision_interval": mean_interval(manifold.generated_inside, measured.block_of),
        "pr_k": NUM_NEIGHBOURS,
        "pr_mode": protocol.neighbour_mode,
    }
    return manifold.generated_inside


def _other_arithmetic(manifold: Manifold, generated: np.ndarray, reference: np.ndarray, device: str) -> str:
    why = "ADM's evaluator rounds distances to float16, other suites do not"
    if max(len(generated), len(reference)) > MAX_COMPARED:
        return f"{why}, which moves precision and recall by about 0.005 (not computed for more than {MAX_COMPARED:,} images)"
    other = precision_recall(generated, reference, k=NUM_NEIGHBOURS, mode="float32", device=device)
    moved = f"({other.precision - manifold.precision:+.4f} and {other.recall - manifold.recall:+.4f})"
    return f"precision and recall in float32, from the same features: {other.precision:.4f} and {other.recall:.4f} {moved}; {why}"


def _kernel_distance(found: Fields, measured: Measured, reference: Reference, protocol: Protocol) -> None:
    assert reference.features is not None
    distance = kernel_distance(measured.rows["pool"], reference.features, variant=protocol.kernel_variant)
    found |= {
        "kid": distance.mean,
        "kid_std": distance.std,
        "kid_interval": kid_interval(measured.rows["pool"], reference.features, measured.block_of),
        "kid_estimator": protocol.kernel_variant,
        "kid_subsets": distance.num_subsets,
        "kid_subset_size": distance.subset_size,
        "kid_seed": distance.seed,
    }
    found["order_sensitive"].append("kid")


def _per_class(
    measured: Measured,
    reference: Reference | None,
    metrics: Sequence[str],
    facts: SetFacts,
    members: np.ndarray | None,
    recognised: np.ndarray | None,
) -> list[dict[str, Any]] | None:
    """A row for each class that has images; None without labels, or if nothing can be said of single classes."""
    if len(facts.label_names) < 2:
        return None
    rows = []
    for label in np.unique(facts.labels).tolist():
        mine = facts.labels == label
        row: dict[str, Any] = {"label": label, "name": str(facts.label_names[label]), "num": int(mine.sum())}
        row["precision"] = float(members[mine].mean()) if members is not None else None
        row["class_accuracy"] = float(recognised[mine].mean()) if recognised is not None else None
        row["fid"] = _class_fid(measured, reference, mine, row["name"]) if "fid" in metrics else None
        rows.append(row)
    told = any(row[key] is not None for row in rows for key in ("precision", "class_accuracy", "fid"))
    return rows if told else None


def _class_fid(measured: Measured, reference: Reference | None, mine: np.ndarray, name: str) -> float | None:
    """FID of one class, where both sides have enough images of it and their features are there."""
    features = measured.rows.get("pool")
    if features is None or reference is None or reference.features is None or reference.labels is None:
        return None
    names = [str(other) for other in reference.label_names]
    if name not in names:
        return None
    theirs = reference.labels == names.index(name)
    needed = IMAGES_PER_FEATURE * features.shape[1]
    if min(int(mine.sum()), int(theirs.sum())) < needed:
        return None
    sides = [Moments(features.shape[1]) for _ in range(2)]
    sides[0].update(features[mine])
    sides[1].update(reference.features[theirs])
    return frechet_distance(*sides)
