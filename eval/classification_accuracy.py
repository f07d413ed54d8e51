"""Classification Accuracy Score (Ravuri and Vinyals, arXiv:1905.10887): a classifier of generated images, tested on real ones.

What the classifier gets wrong, the generator has not shown it: classes that look wrong or too much alike, and variety that is missing.
The published protocol is a ResNet-50 (architecture `resnet50`, 90 epochs) on as many generated images as ImageNet has.

Shapes: N images, B images of a batch, K classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genvision.data.sources import ImageSource
from genvision.eval.accuracy import INTERVAL_METHOD, match_classes, wilson_interval
from genvision.eval.classifier import MOMENTUM, SMALL_SIDE, ClassifierConfig, Classifying
from genvision.eval.job import software_versions
from genvision.eval.report import format_table
from genvision.eval.sets import find_image_size

SCHEMA = "genvision.cas/1"
Interval = tuple[float, float]
WORST_CLASSES = 10
"""Classes whose mistakes are listed."""
MISTAKES = 3


@dataclass(frozen=True, kw_only=True)
class CASResult:
    """Accuracy on real images after training on generated ones, and what it depends on. None: not measured."""

    schema: str = SCHEMA

    top1: float
    top5: float | None = None
    """Only with 10 classes or more."""
    baseline_top1: float | None = None
    """After training on real images in the same way."""
    baseline_top5: float | None = None
    gap: float | None = None
    """baseline_top1 - top1."""

    top1_interval: Interval
    top5_interval: Interval | None = None
    baseline_top1_interval: Interval | None = None
    baseline_top5_interval: Interval | None = None
    interval_method: str = INTERVAL_METHOD

    per_class: list[dict[str, Any]]
    """label, name, num (real images), num_generated, accuracy (None without real images), baseline_accuracy, and for the worst classes
    taken_for: the classes that they were mistaken for most often, with shares of their images."""

    num_generated: int
    num_real: int
    num_baseline: int | None = None
    num_classes: int
    generated: str
    generated_hash: str
    real: str
    real_hash: str
    baseline: str | None = None
    baseline_hash: str | None = None
    image_size: int
    crop: str
    """Of the real images."""

    architecture: str
    stem: str
    num_steps: int
    batch_size: int
    learning_rate: float
    momentum: float = MOMENTUM
    weight_decay: float
    label_smoothing: float
    training_crop: str
    flip: bool
    dtype: str
    seed: int
    training_loss: float
    """Mean over the last twentieth of the steps."""

    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def classification_accuracy_score(
    generated: ImageSource,
    real: ImageSource,
    *,
    baseline: ImageSource | None = None,
    image_size: int | None = None,
    config: ClassifierConfig | None = None,
    num_workers: int = 0,
    device: str = "cpu",
    show_progress: bool = False,
) -> CASResult:
    """Train on `generated`, test on `real`.

    Args:
        baseline: real images to train on in the same way, no part of `real`; the gap to them is what generation loses.
        image_size: side to which all images are cropped; that of the first real image unless told.

    Raises:
        UserError: the classes do not match, images cannot be read or differ in size, or training diverges.
    """
    began = time.monotonic()
    config = config or ClassifierConfig()
    size = find_image_size(real, image_size)
    translation, matching = match_classes(generated.label_names, real.label_names)
    notes, warnings = [], [matching] if matching else []
    if (first := generated.load(0)).size != (size, size):
        notes.append(
            f"generated images ({first.height}x{first.width} pixels, the first one) are cropped to {size}x{size} like the real ones"
        )
    num_steps = config.steps_for(len(generated))
    generated_hash, real_hash = generated.content_hash(), real.content_hash()
    if generated_hash == real_hash:
        warnings.append("the generated images are the real ones that they are tested on: this is no score")
    counts = np.bincount(translation[generated.labels], minlength=real.num_classes)
    if absent := [real.label_names[label] for label in np.flatnonzero(counts == 0)]:
        warnings.append(f"{len(absent):,} classes have no generated images ('{absent[0]}' is the first): they cannot be recognised")
    if num_steps * config.batch_size < len(generated):
        warnings.append(f"{num_steps:,} steps of {config.batch_size} do not even show every generated image once; give more steps")

    classifying = Classifying(
        config=config,
        num_steps=num_steps,
        image_size=size,
        num_classes=real.num_classes,
        num_workers=num_workers,
        device=device,
        show_progress=show_progress,
    )
    network, loss = classifying.train(generated, translation, "training on generated images")
    ranked = classifying.rank(network, real, "testing on real images")
    real_ranked = baseline_hash = None
    if baseline is not None:
        back, matching = match_classes(baseline.label_names, real.label_names, "the baseline")
        warnings += [matching] if matching else []
        baseline_hash = baseline.content_hash()
        if baseline_hash == real_hash:
            warnings.append("the baseline is trained on the real images that it is tested on: the gap is no gap")
        real_network, _ = classifying.train(baseline, back, "training on real images")
        real_ranked = classifying.rank(real_network, real, "testing on real images")
    top1, top5 = _accuracies(ranked, real)
    real_top1, real_top5 = _accuracies(real_ranked, real) if real_ranked is not None else (None, None)
    if real.num_classes < 10:
        notes.append("top-5 accuracy is left out: it says little with fewer than 10 classes")
    return CASResult(
        top1=top1.value,
        top1_interval=top1.interval,
        top5=top5.value if top5 else None,
        top5_interval=top5.interval if top5 else None,
        baseline_top1=real_top1.value if real_top1 else None,
        baseline_top1_interval=real_top1.interval if real_top1 else None,
        baseline_top5=real_top5.value if real_top5 else None,
        baseline_top5_interval=real_top5.interval if real_top5 else None,
        gap=real_top1.value - top1.value if real_top1 else None,
        per_class=_per_class(real, ranked[:, 0], None if real_ranked is None else real_ranked[:, 0], counts),
        num_generated=len(generated),
        num_real=len(real),
        num_baseline=None if baseline is None else len(baseline),
        num_classes=real.num_classes,
        generated=generated.spec,
        generated_hash=generated_hash,
        real=real.spec,
        real_hash=real_hash,
        baseline=None if baseline is None else baseline.spec,
        baseline_hash=baseline_hash,
        image_size=size,
        crop=f"ADM centre crop to {size}",
        architecture=config.architecture,
        stem="3x3, no pooling" if size <= SMALL_SIDE or config.architecture == "resnet20" else "7x7 with stride 2, pooling",
        num_steps=num_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
        training_crop=config.crop,
        flip=config.flip,
        dtype=config.dtype,
        seed=config.seed,
        training_loss=loss,
        device=device,
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        notes=notes,
        warnings=warnings,
    )


def format_cas(result: CASResult, num_worst: int = WORST_CLASSES) -> str:
    """The table of a result, and its worst classes with what they were taken for."""
    tested = sorted((row for row in result.per_class if row["accuracy"] is not None), key=lambda row: (row["accuracy"], row["label"]))
    width = max(len(row["name"]) for row in tested[:num_worst])
    lines = [f"worst of {len(tested):,} classes (images, accuracy, taken for):"]
    for row in tested[:num_worst]:
        mistakes = ", ".join(f"{name} {share:.0%}" for name, share in row["taken_for"].items())
        lines.append(f"  {row['name']:<{width}}  {row['num']:>6,}  {row['accuracy']:6.1%}  {mistakes}".rstrip())
    return "\n".join([format_table(result), "", *lines])


@dataclass(frozen=True)
class _Accuracy:
    value: float
    interval: Interval


def _accuracies(ranked: np.ndarray, real: ImageSource) -> tuple[_Accuracy, _Accuracy | None]:
    """Top-1, and top-5 where there are 10 classes or more."""
    right = ranked == real.labels[:, None]

    def share(hits: np.ndarray) -> _Accuracy:
        return _Accuracy(float(hits.mean()), wilson_interval(int(hits.sum()), len(hits)))

    return share(right[:, 0]), share(right.any(axis=1)) if real.num_classes >= 10 else None


def _per_class(real: ImageSource, guessed: np.ndarray, baseline: np.ndarray | None, num_generated: np.ndarray) -> list[dict[str, Any]]:
    """A row for each class in the order of labels; the worst ones say what they were taken for."""
    rows: list[dict[str, Any]] = []
    for label, name in enumerate(real.label_names):
        mine = real.labels == label
        num = int(mine.sum())
        rows.append(
            {
                "label": label,
                "name": name,
                "num": num,
                "num_generated": int(num_generated[label]),
                "accuracy": float((guessed[mine] == label).mean()) if num else None,
                "baseline_accuracy": float((baseline[mine] == label).mean()) if num and baseline is not None else None,
                "taken_for": {},
            }
        )
    tested = sorted((row for row in rows if row["num"]), key=lambda row: (row["accuracy"], row["label"]))
    for row in tested[:WORST_CLASSES]:
        row["taken_for"] = _mistakes(guessed[real.labels == row["label"]], row["label"], real.label_names)
    return rows


def _mistakes(guessed: np.ndarray, label: int, names: Sequence[str]) -> dict[str, float]:
    """The commonest wrong answers with their shares, commonest first."""
    counts = np.bincount(guessed, minlength=len(names))
    counts[label] = 0
    order = np.argsort(-counts, kind="stable")[:MISTAKES]
    return {names[other]: float(counts[other] / len(guessed)) for other in order.tolist() if counts[other]}
