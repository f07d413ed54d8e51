"""Scoring a set of generated images against a reference under a named protocol.

`evaluate` takes data specs, `score_arrays` takes images in memory; `genvision.jobs.fid` scores images as they are drawn. All three make a
`Plan` first, which refuses what cannot be measured before any work is done, then one pass over each set, then the scores.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

import genvision
from genvision.data.sources import ImageSource, open_source
from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.features import Extractor, ExtractorOptions, load_extractor
from genvision.eval.hygiene import (
    JPEG_SAMPLE,
    count_duplicates,
    count_warning,
    duplicate_warning,
    format_warning,
    hash_of_set,
    jpeg_warning,
    order_warning,
    score_hint,
)
from genvision.eval.measurement import Measured, Measurement, Networks, measure
from genvision.eval.protocols import COMPARING, Protocol, load_protocol
from genvision.eval.reference import GAUSSIAN_OF, ROWS_OF, Reference, SetOptions, open_any, prepare_reference, unavailable
from genvision.eval.reference_files import ReferenceFile
from genvision.eval.result import EvaluationResult
from genvision.eval.scores import SetFacts, score_set
from genvision.eval.sets import ArraySource, describe_labels, find_image_size
from genvision.processes import from_main, process_state

LOOKED_AT = {"is": "logits", "class_accuracy": "judged"}
"""Metric to the rows of the generated set that it needs image by image."""
SMALL_SIDE = 32
"""Images below this many pixels a side may be equal by chance; only many equal ones are worth a warning."""
MAX_COMPARED_IMAGES = 50_000
"""Reference images with which a set is compared one by one unless told otherwise: they are held in memory."""
ReferenceLike = str | np.ndarray | ImageSource | ReferenceFile


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How to score."""

    protocol: str = "adm"
    """Name of a protocol."""
    metrics: tuple[str, ...] | None = None
    """Of the protocol's; None takes its default ones, as far as the reference and the labels allow."""
    extractor: str | Extractor | None = None
    """Another extractor than the protocol's."""
    networks: ExtractorOptions = field(default_factory=ExtractorOptions)
    """Where weights come from and where the networks run."""
    image_size: int | None = None
    """Centre-crop both sets to this side as ADM does; None takes images as they are, and they must be of one size."""
    batch_size: int = 64
    """Images in one pass of the networks."""
    num_workers: int = 0
    """Processes that decode images."""
    cache: StatisticsCache | None = None
    """Where statistics of references are kept; None keeps none."""
    show_progress: bool = True

    def __post_init__(self) -> None:
        _ = self.sets  # which refuses impossible numbers

    @property
    def sets(self) -> SetOptions:
        """How the images of a set are read."""
        return SetOptions(
            image_size=self.image_size, batch_size=self.batch_size, num_workers=self.num_workers, show_progress=self.show_progress
        )


class DigitsFloor(NamedTuple):
    """What real digits score; a generator trained on the first half can hardly do better."""

    fid: float
    """FID of the first half against the second."""
    class_accuracy: float
    """Accuracy of the judge on the first half, of which it has seen nothing."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured, with everything that it needs: networks loaded, reference ready."""

    protocol: Protocol
    metrics: tuple[str, ...]
    networks: Networks
    reference: Reference | None
    options: EvaluationOptions
    left_out: list[str]
    """Which of the protocol's metrics are not measured, and why."""

    @property
    def moments(self) -> frozenset[str]:
        """Rows whose moments are taken."""
        return frozenset(GAUSSIAN_OF[metric] for metric in self.metrics if metric in GAUSSIAN_OF)

    @property
    def kept(self) -> frozenset[str]:
        """Rows that are kept image by image."""
        rows = {ROWS_OF[metric] for metric in self.metrics if metric in ROWS_OF}
        return frozenset(rows | {LOOKED_AT[metric] for metric in self.metrics if metric in LOOKED_AT})

    @property
    def rows(self) -> frozenset[str]:
        """All rows that the networks are asked for."""
        return self.moments | self.kept

    def measurement(self) -> Measurement:
        """An empty one for the generated set."""
        return Measurement({name: self.networks.dim(name) for name in self.moments}, self.kept)

    def score(self, measured: Measured, facts: SetFacts, *, began: float, **fields: Any) -> EvaluationResult:
        """The result, on every process.

        Args:
            began: time.monotonic() at the start of the job.
            fields: of the result that only the caller knows.
        """
        state = process_state()
        result = None
        if state.is_main_process:
            result = self._result(measured, facts, began, fields)
            for line in result.warnings:
                print(f"warning: {line}", file=sys.stderr, flush=True)
        final = from_main(lambda: result)
        assert isinstance(final, EvaluationResult)
        return final

    def _result(self, measured: Measured, facts: SetFacts, began: float, fields: dict[str, Any]) -> EvaluationResult:
        scores = score_set(measured, self.reference, self.protocol, self.metrics, facts, self.networks.extractor.device)
        reference, networks = self.reference, self.networks
        seconds = time.monotonic() - began
        warnings = [*(reference.warnings if reference else []), *fields.pop("warnings", []), *self._warnings(measured, facts, scores)]
        scores["notes"] += self.left_out
        if self.protocol.extractor != networks.extractor.name:
            scores["notes"].append(f"extractor {networks.extractor.name} instead of {self.protocol.extractor}, which the protocol names")
        return EvaluationResult(
            protocol=self.protocol.name,
            num_generated=len(measured),
            num_reference=reference.num_images if reference else None,
            num_reference_statistics=_count_of(reference),
            generated=facts.name,
            generated_hash=facts.content_hash,
            generated_formats=facts.formats,
            num_duplicates=count_duplicates(measured.hashes),
            reference=reference.name if reference else None,
            reference_hash=reference.content_hash if reference else None,
            reference_origin=reference.origin if reference else None,
            reference_cached=reference.cached if reference else None,
            labels=facts.label_law,
            order=facts.order,
            image_size=facts.image_size,
            crop=facts.crop,
            extractor=networks.extractor.name,
            extractor_hash=networks.extractor.weights_hash,
            resize=networks.extractor.resize,
            feature_dim=networks.extractor.feature_dim,
            dinov2_hash=networks.dinov2.weights_hash if networks.dinov2 else None,
            judge_hash=networks.judge.weights_hash if networks.judge else None,
            num_processes=process_state().num_processes,
            batch_size=self.options.batch_size,
            device=networks.extractor.device,
            seconds=round(seconds, 2),
            images_per_second=round(len(measured) / max(seconds, 1e-9), 2),
            versions=software_versions(),
            warnings=warnings,
            **scores,
            **fields,
        )

    def _warnings(self, measured: Measured, facts: SetFacts, scores: Mapping[str, Any]) -> list[str]:
        compares = any(metric in GAUSSIAN_OF for metric in self.metrics)
        sides = [(len(measured), f"the generated set {facts.name}")]
        if self.reference is not None and (count := _count_of(self.reference)) is not None:
            sides.append((count, f"the reference {self.reference.name}"))
        dim = self.networks.extractor.feature_dim
        found = [count_warning(count, which, dim) for count, which in sides if compares]
        if facts.image_size >= SMALL_SIDE or 3 * count_duplicates(measured.hashes) > len(measured):  # tiny images coincide by chance
            found.append(duplicate_warning(measured.hashes, facts.numbers))
        if "is" in self.metrics and self.protocol.score_estimator != "torch-fidelity":
            found.append(order_warning(facts.labels if len(facts.label_names) > 1 else None, measured.rows["logits"]))
        found.append(format_warning(facts.formats))
        found.append(jpeg_warning(facts.some_images) if "JPEG" not in facts.formats else None)
        found.append(score_hint(scores, len(facts.label_names)))
        return [line for line in found if line is not None]


def plan_evaluation(
    reference: ReferenceLike | None,
    *,
    num: int,
    image_size: int,
    label_names: Sequence[str],
    name: str = "the generated set",
    options: EvaluationOptions,
) -> Plan:
    """Choose the metrics, load the networks and measure the reference; everything that can be refused is refused here.

    Args:
        reference: a data spec, a file of statistics, images uint8 [M, S, S, 3], or None.
        num: images of the set that will be scored; `image_size` their side, `label_names` their classes.

    Raises:
        UserError: a metric, protocol, extractor or reference cannot be used, images are too few or of another size, or weights are missing.
    """
    protocol = load_protocol(options.protocol)
    target = (
        None if reference is None else open_any(ArraySource(reference, name="array") if isinstance(reference, np.ndarray) else reference)
    )
    metrics, left_out = _choose_metrics(protocol, options.metrics, target, label_names)
    _check_count(name, num, 10 if "is" in metrics and protocol.score_estimator != "adm" else 2)
    if "pr" in metrics:
        _check_count(name, num, 4)
    if target is not None and set(metrics) & COMPARING:
        _check_size(target, image_size, name, options)
    networks = load_networks(protocol, metrics, options)
    needed = tuple(metric for metric in metrics if metric in COMPARING)
    prepared = prepare_reference(target, networks, needed, options.sets, options.cache) if target is not None and needed else None
    return Plan(protocol=protocol, metrics=metrics, networks=networks, reference=prepared, options=options, left_out=left_out)


def evaluate(
    generated: str | ImageSource, reference: ReferenceLike | None, *, options: EvaluationOptions | None = None
) -> EvaluationResult:
    """Score the images of one data spec against a reference; on any number of processes, the result on each.

    Args:
        reference: a data spec or a file of statistics; None if no metric compares.

    Raises:
        UserError: see `plan_evaluation`; or an image cannot be read, or images differ in size.
    """
    began = time.monotonic()
    options = options or EvaluationOptions()
    source = open_source(generated) if isinstance(generated, str) else generated
    size = find_image_size(source, options.image_size)
    plan = plan_evaluation(reference, num=len(source), image_size=size, label_names=source.label_names, name=source.spec, options=options)
    measured = measure(
        source,
        plan.networks,
        moments=plan.moments,
        kept=plan.kept,
        image_size=options.image_size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        show_progress=options.show_progress,
        description="generated",
    )
    facts = SetFacts(
        name=source.spec,
        content_hash=hash_of_set(measured.hashes),
        labels=source.labels,
        label_names=source.label_names,
        label_law=describe_labels(source),
        image_size=size,
        crop=options.sets.crop,
        formats=source.stored_formats(),
        order="as stored",
        some_images=_some_images(source, options.image_size),
    )
    return plan.score(measured, facts, began=began)


def score_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    reference: ReferenceLike | None,
    *,
    name: str = "array",
    options: EvaluationOptions | None = None,
) -> EvaluationResult:
    """Score images in memory.

    Args:
        images: uint8 [N, S, S, 3].
        labels: the classes asked for, whole numbers [N]; None if there are none.
        name: what to call the set in the result.

    Raises:
        UserError: as `evaluate`.
    """
    return evaluate(ArraySource(images, labels, name), reference, options=options)


def digits_floor() -> DigitsFloor:
    """FID of digits:first against digits:second, and the judge's accuracy on digits:first."""
    options = EvaluationOptions(protocol="digits", metrics=("fid", "class_accuracy"), show_progress=False)
    result = evaluate("digits:first", "digits:second", options=options)
    assert result.fid is not None and result.class_accuracy is not None
    return DigitsFloor(result.fid, result.class_accuracy)


def software_versions() -> dict[str, str]:
    """Versions of everything that computes the numbers."""
    packages = ("torch", "torch-fidelity", "numpy", "scipy", "pillow")
    return {"genvision": genvision.__version__, **{package: metadata.version(package) for package in packages}}


def _choose_metrics(
    protocol: Protocol, wanted: Sequence[str] | None, reference: ImageSource | ReferenceFile | None, label_names: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """What is to be measured, and why some default metrics are not; what was asked for by name and cannot be had is refused."""
    metrics = protocol.choose(wanted)
    problems = {
        metric: f"{metric} compares with a reference and none was given; add --reference, or leave {metric} out of --metrics"
        for metric in metrics
        if metric in COMPARING and reference is None
    }
    if reference is not None:
        problems |= {metric: f"{why}; leave it out of --metrics, or give images" for metric, why in unavailable(reference, metrics).items()}
    if "class_accuracy" in metrics and not all(len(name) == 1 and name in "0123456789" for name in map(str, label_names)):
        problems["class_accuracy"] = "class_accuracy needs generated images whose classes are called 0 to 9; give labels, or leave it out"
    if wanted is not None and problems:
        raise UserError(next(iter(problems.values())))
    if wanted is None and isinstance(reference, ImageSource) and len(reference) > MAX_COMPARED_IMAGES:
        too_many = f"compares image by image, too much for a reference of {len(reference):,}; name it in --metrics to do it anyway"
        problems |= {metric: f"{metric} {too_many}" for metric in metrics if metric in ROWS_OF}
    left = tuple(metric for metric in metrics if metric not in problems)
    if not left:
        raise UserError(f"protocol {protocol.name} measures nothing here: {next(iter(problems.values()))}")
    told = [f"not measured: {why}" for metric, why in problems.items() if metric != "class_accuracy" and reference is not None]
    return left, told


def load_networks(protocol: Protocol, metrics: Sequence[str], options: EvaluationOptions) -> Networks:
    """The networks that these metrics need.

    Raises:
        UserError: weights are missing, or the extractor does not give what a metric needs.
    """
    chosen = options.extractor or protocol.extractor
    extractor = load_extractor(chosen, options.networks) if isinstance(chosen, str) else chosen
    if "sfid" in metrics and extractor.spatial_dim == 0:
        raise UserError(f"sfid needs the features of Inception, extractor '{extractor.name}' has none; leave sfid out of --metrics")
    if "is" in metrics and extractor.num_logits == 0:
        raise UserError(f"is needs the classes of Inception, extractor '{extractor.name}' has none; leave is out of --metrics")
    judge = None
    if "class_accuracy" in metrics:
        from genvision.eval.digits import digits_judge

        judge = digits_judge()
    dinov2 = load_extractor("dinov2", options.networks) if "fd_dinov2" in metrics else None
    return Networks(extractor=extractor, dinov2=dinov2, judge=judge)


def _check_size(target: ImageSource | ReferenceFile, size: int, name: str, options: EvaluationOptions) -> None:
    """Refuse a reference of another resolution."""
    if isinstance(target, ImageSource):
        theirs, who = find_image_size(target, options.image_size), target.spec
    else:
        stored = target.facts.get("image_size")
        theirs = int(stored) if stored is not None else find_image_size(target.images) if target.images is not None else size
        who = str(target.path)
    if theirs != size:
        raise UserError(
            f"{name} has images of {size}x{size} pixels, the reference {who} of {theirs}x{theirs}; crop both to one size with --image-size"
        )


def _some_images(source: ImageSource, image_size: int | None) -> list[np.ndarray]:
    """Images from all over the set that show whether it once was JPEG; as they are stored, since a crop would move the grid."""
    if image_size is not None:
        return []
    chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), JPEG_SAMPLE)).astype(np.int64))
    return [np.asarray(source.load(int(i))) for i in chosen] if process_state().is_main_process else []


def _count_of(reference: Reference | None) -> int | None:
    counts = [gaussian.count for gaussian in reference.statistics.values()] if reference else []
    return counts[0] if counts else None


def _check_count(name: str, num: int, at_least: int) -> None:
    if num < at_least:
        raise UserError(f"{name}: scores need at least {at_least} images, got {num}; give more images")
