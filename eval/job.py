"""Scoring a set of generated images against a reference set: FID, Inception Score, class accuracy.

`evaluate` takes data specs, `score_arrays` takes images in memory; both give an `EvaluationResult` that names everything that can move
the numbers. A reference is measured once (`measure_reference`) and can serve for many sets.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import genvision
from genvision.data.sources import ImageSource, open_source
from genvision.errors import UserError
from genvision.eval.features import Extractor, ExtractorOptions, load_extractor
from genvision.eval.metrics import Moments, frechet_distance, inception_score
from genvision.eval.sets import ArraySource, describe_labels, find_image_size, stream_images

METRICS = ("fid", "is", "class_accuracy")
IS_SPLITS = 10
IS_SHUFFLE_SEED = 2020


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores of one set, and what they depend on; docs/evaluation.md explains every field. None: not measured."""

    fid: float | None
    inception_score: float | None
    inception_score_std: float | None
    class_accuracy: float | None
    num_generated: int
    num_reference: int | None
    generated: str
    generated_fingerprint: str
    reference: str | None
    reference_fingerprint: str | None
    labels: str
    image_size: int
    crop: str
    resize: str
    extractor: str
    extractor_hash: str
    feature_dim: int
    judge_hash: str | None
    is_splits: int | None
    is_shuffle_seed: int | None
    feature_dtype: str
    statistics_dtype: str
    batch_size: int
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of a reference set under one extractor."""

    moments: Moments
    name: str
    fingerprint: str
    image_size: int
    extractor_hash: str


class DigitsFloor(NamedTuple):
    """What real digits score; a generator trained on the first half can hardly do better."""

    fid: float
    """FID of the first half against the second."""
    class_accuracy: float
    """Accuracy of the judge on the first half, of which it has seen nothing."""


def evaluate(
    generated: str,
    reference: str | None,
    *,
    extractor: str = "inception",
    metrics: Sequence[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    inception_weights: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    image_size: int | None = None,
    show_progress: bool = True,
) -> EvaluationResult:
    """Score the images of one data spec against those of another.

    Args:
        reference: None if `fid` is not wanted.
        metrics: of `fid`, `is`, `class_accuracy`; None takes all that the reference, the extractor and the labels allow.
        image_size: centre-crop both sets to this side as ADM does; None takes images as they are, and they must be of one size.

    Raises:
        UserError: a spec, metric or extractor is unknown, weights are missing, images differ in size or are too few.
    """
    options = _Options(image_size, batch_size, num_workers, show_progress)
    network_options = ExtractorOptions(inception_weights=inception_weights, download=download, device=device)
    sources = open_source(generated), None if reference is None else open_source(reference)
    return _score(*sources, load_extractor(extractor, network_options), metrics, options)


def score_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    reference: Reference | np.ndarray | str | None,
    *,
    extractor: Extractor | str = "digits",
    metrics: Sequence[str] | None = None,
    name: str = "array",
    batch_size: int = 64,
    show_progress: bool = False,
) -> EvaluationResult:
    """Score images in memory.

    Args:
        images: uint8 [N, S, S, 3].
        labels: the classes asked for, whole numbers [N]; None if there are none.
        reference: what `measure_reference` gave (best if several sets are scored), images uint8 [M, S, S, 3], or a data spec.
        name: what to call the set in the result.

    Raises:
        UserError: as `evaluate`.
    """
    network = load_extractor(extractor) if isinstance(extractor, str) else extractor
    target = reference if isinstance(reference, Reference | None) else _open(reference)
    return _score(ArraySource(images, labels, name), target, network, metrics, _Options(None, batch_size, 0, show_progress))


def measure_reference(
    images: np.ndarray | str,
    extractor: Extractor,
    *,
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    show_progress: bool = False,
) -> Reference:
    """Statistics of a reference set (uint8 [N, S, S, 3] or a data spec), for any number of evaluations."""
    return _measure(_open(images), extractor, _Options(image_size, batch_size, num_workers, show_progress))


def digits_floor() -> DigitsFloor:
    """FID of digits:first against digits:second, and the judge's accuracy on digits:first."""
    result = evaluate("digits:first", "digits:second", extractor="digits", metrics=("fid", "class_accuracy"), show_progress=False)
    assert result.fid is not None and result.class_accuracy is not None
    return DigitsFloor(result.fid, result.class_accuracy)


def small_sample_warning(num_images: int, which: str, extractor: Extractor) -> str | None:
    """One line if a covariance of so many images is singular, which makes FID far too high; None if it is not."""
    if num_images >= extractor.feature_dim:
        return None
    return (
        f"{which} has {num_images} images, fewer than the {extractor.feature_dim} features: FID is biased upwards; "
        "compare it only with sets of the same size"
    )


def software_versions() -> dict[str, str]:
    """Versions of everything that computes the numbers."""
    packages = ("torch", "torch-fidelity", "numpy", "pillow")
    return {"genvision": genvision.__version__, **{package: metadata.version(package) for package in packages}}


@dataclass(frozen=True)
class _Options:
    image_size: int | None
    batch_size: int
    num_workers: int
    show_progress: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def crop(self) -> str:
        return "none" if self.image_size is None else f"ADM centre crop to {self.image_size}"


def _score(
    source: ImageSource,
    reference: Reference | ImageSource | None,
    extractor: Extractor,
    metrics: Sequence[str] | None,
    options: _Options,
) -> EvaluationResult:
    began = time.monotonic()
    digits = _digit_labels(source)
    chosen = _choose_metrics(metrics, reference, extractor, digits)
    _check_count(source, IS_SPLITS if "is" in chosen else 2)
    size = find_image_size(source, options.image_size)
    target = _prepare_reference(reference, source, size, extractor, options) if reference is not None and "fid" in chosen else None
    judge = None
    if "class_accuracy" in chosen:
        from genvision.eval.digits import digits_judge

        judge = digits_judge()

    moments, logits, judged = Moments(extractor.feature_dim), list[Tensor](), list[np.ndarray]()
    for images, _ in _stream(source, options, "generated"):
        found = extractor(images)
        moments.update(found.features)
        if "is" in chosen:
            logits.append(found.logits)
        if judge is not None:
            judged.append(judge(images))

    warnings = []
    if target is not None:
        sides = (moments.count, f"the generated set {source.spec}"), (target.moments.count, f"the reference {target.name}")
        warnings = [line for count, which in sides if (line := small_sample_warning(count, which, extractor))]
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    score = inception_score(torch.cat(logits), IS_SPLITS, IS_SHUFFLE_SEED) if logits else None
    return EvaluationResult(
        fid=frechet_distance(moments, target.moments) if target else None,
        inception_score=score.mean if score else None,
        inception_score_std=score.std if score else None,
        class_accuracy=float(np.mean(np.concatenate(judged) == digits)) if judged else None,
        num_generated=moments.count,
        num_reference=target.moments.count if target else None,
        generated=source.spec,
        generated_fingerprint=source.fingerprint(),
        reference=target.name if target else None,
        reference_fingerprint=target.fingerprint if target else None,
        labels=describe_labels(source),
        image_size=size,
        crop=options.crop,
        resize=extractor.resize,
        extractor=extractor.name,
        extractor_hash=extractor.weights_hash,
        feature_dim=extractor.feature_dim,
        judge_hash=judge.weights_hash if judge else None,
        is_splits=IS_SPLITS if score else None,
        is_shuffle_seed=IS_SHUFFLE_SEED if score else None,
        feature_dtype="float32",
        statistics_dtype="float64",
        batch_size=options.batch_size,
        device=extractor.device,
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        warnings=warnings,
    )


def _choose_metrics(
    wanted: Sequence[str] | None, reference: Reference | ImageSource | None, extractor: Extractor, digits: np.ndarray | None
) -> set[str]:
    """What is to be measured; refuses what cannot be."""
    judgeable = extractor.name == "digits" and digits is not None
    if wanted is None:
        return {"is", *(["fid"] if reference is not None else []), *(["class_accuracy"] if judgeable else [])}
    unknown = [metric for metric in wanted if metric not in METRICS]
    if unknown or not wanted:
        problem = f"metric '{', '.join(unknown)}' is unknown" if unknown else "no metric was asked for"
        raise UserError(f"{problem}; choose from {', '.join(METRICS)}")
    if "fid" in wanted and reference is None:
        raise UserError("fid compares with a reference and none was given; add --reference, or leave fid out of --metrics")
    if "class_accuracy" in wanted and extractor.name != "digits":
        raise UserError(f"class_accuracy judges digits, the extractor is '{extractor.name}'; use --extractor digits, or leave it out")
    if "class_accuracy" in wanted and not judgeable:
        raise UserError("class_accuracy needs generated images whose classes are called 0 to 9; give labels, or leave it out")
    return set(wanted)


def _digit_labels(source: ImageSource) -> np.ndarray | None:
    """The digit each image should show, int64 [N]; None if the classes are not digits."""
    if not all(name in "0123456789" and len(name) == 1 for name in source.label_names):
        return None
    return np.array([int(name) for name in source.label_names], dtype=np.int64)[source.labels]


def _prepare_reference(
    reference: Reference | ImageSource, source: ImageSource, size: int, extractor: Extractor, options: _Options
) -> Reference:
    """The reference's statistics, after all checks that cost nothing."""
    name = reference.name if isinstance(reference, Reference) else reference.spec
    reference_size = reference.image_size if isinstance(reference, Reference) else find_image_size(reference, options.image_size)
    if reference_size != size:
        raise UserError(
            f"{source.spec} has images of {size}x{size} pixels, the reference {name} of {reference_size}x{reference_size}; "
            "give --image-size to crop both to one size"
        )
    if isinstance(reference, Reference) and reference.extractor_hash != extractor.weights_hash:
        raise UserError(f"the reference {name} was measured with another extractor than '{extractor.name}'; measure it again")
    return reference if isinstance(reference, Reference) else _measure(reference, extractor, options)


def _measure(source: ImageSource, extractor: Extractor, options: _Options) -> Reference:
    _check_count(source, 2)
    moments = Moments(extractor.feature_dim)
    for images, _ in _stream(source, options, "reference"):
        moments.update(extractor(images).features)
    return Reference(
        moments=moments,
        name=source.spec,
        fingerprint=source.fingerprint(),
        image_size=find_image_size(source, options.image_size),
        extractor_hash=extractor.weights_hash,
    )


def _stream(source: ImageSource, options: _Options, description: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return stream_images(
        source,
        options.image_size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        show_progress=options.show_progress,
        description=description,
    )


def _open(images: np.ndarray | str) -> ImageSource:
    return open_source(images) if isinstance(images, str) else ArraySource(images, name="array")


def _check_count(source: ImageSource, at_least: int) -> None:
    if len(source) < at_least:
        raise UserError(f"{source.spec}: scores need at least {at_least} images, got {len(source)}; give more images")
