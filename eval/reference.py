"""What a set is compared with: statistics and features of a reference, from images, from a file of statistics, or from the cache.

ADM's files hold both: statistics of the whole training set, which FID and sFID use, and 10,000 images, which only precision and recall
use. That is how published numbers were made, so stored statistics are never replaced by those of the images beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.measurement import Networks, measure
from genvision.eval.moments import Gaussian
from genvision.eval.reference_files import ReferenceFile, open_reference
from genvision.eval.sets import find_image_size
from genvision.processes import from_main, process_state

GAUSSIAN_OF = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dinov2"}
"""Metric to the rows whose statistics it compares."""
ROWS_OF = {"pr": "pool", "kid": "pool"}
"""Metric to the rows that it compares image by image."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Everything that is compared with."""

    name: str
    content_hash: str
    """sha256 of the file of statistics, or of the images."""
    origin: str
    """`images`, or `stored statistics` and what its images were used for."""
    image_size: int | None
    """Side of the images in pixels; None where only statistics are known."""
    statistics: dict[str, Gaussian] = field(repr=False)
    features: np.ndarray | None = field(repr=False)
    """float32 [M, D] of each image; None unless asked for."""
    labels: np.ndarray | None = field(repr=False)
    label_names: list[str]
    num_images: int | None
    extractor_hash: str
    cached: bool | None
    """Whether the numbers came from the cache; None if there was nothing to compute."""
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """How the images of a set are read."""

    image_size: int | None = None
    """Centre-crop to this side as ADM does; None takes images as they are."""
    batch_size: int = 64
    num_workers: int = 0
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, got {self.batch_size} and {self.num_workers}")

    @property
    def crop(self) -> str:
        """In words, for the result file."""
        return "none" if self.image_size is None else f"ADM centre crop to {self.image_size}"


def open_any(reference: "str | ImageSource | ReferenceFile") -> ImageSource | ReferenceFile:
    """A data spec, a file of statistics, or what has been opened already."""
    return open_reference(reference) if isinstance(reference, str) else reference


def unavailable(reference: ImageSource | ReferenceFile, metrics: tuple[str, ...]) -> dict[str, str]:
    """Those of the metrics for which this reference does not hold enough, each with the reason."""
    if isinstance(reference, ImageSource):
        return {}
    missing = {}
    for metric in metrics:
        stored = GAUSSIAN_OF.get(metric)
        if stored is not None and stored not in reference.statistics:
            missing[metric] = f"{reference.path}: holds no statistics for {metric}"
        if metric in ROWS_OF and reference.images is None:
            missing[metric] = f"{reference.path}: holds statistics only, and {metric} compares with images"
    return missing


def prepare_reference(
    reference: ImageSource | ReferenceFile, networks: Networks, metrics: tuple[str, ...], options: SetOptions, cache: StatisticsCache | None
) -> Reference:
    """Everything that the metrics compare with; measured only where it is neither stored nor cached.

    Args:
        metrics: all of them available from this reference.
        cache: None measures anew and keeps nothing.

    Raises:
        UserError: the reference was measured with another extractor, or its images cannot be used.
    """
    moments = frozenset(GAUSSIAN_OF[metric] for metric in metrics if metric in GAUSSIAN_OF)
    kept = frozenset(ROWS_OF[metric] for metric in metrics if metric in ROWS_OF)
    if isinstance(reference, ImageSource):
        if len(reference) < 2:
            raise UserError(f"{reference.spec}: a reference needs at least 2 images, got {len(reference)}; give more images")
        content_hash = from_main(lambda: reference.content_hash(show_progress=options.show_progress))
        found = _measure_or_load(reference, content_hash, networks, moments, kept, options, cache)
        return Reference(
            name=reference.spec,
            content_hash=content_hash,
            origin="images",
            image_size=find_image_size(reference, options.image_size),
            statistics=found.statistics,
            features=found.features,
            labels=reference.labels,
            label_names=reference.label_names,
            num_images=len(reference),
            extractor_hash=networks.extractor.weights_hash,
            cached=found.cached,
            warnings=found.warnings,
        )
    _check_facts(reference, moments, networks)
    images, found, size = reference.images, _Found({}, None, None, []), reference.facts.get("image_size")
    if images is not None:
        size = find_image_size(images, options.image_size)
    origin = "stored statistics"
    if kept:
        assert images is not None
        found = _measure_or_load(images, reference.content_hash, networks, frozenset(), kept, options, cache)
        origin += f" for Frechet distances, its {len(images):,} images for the rest"
    return Reference(
        name=str(reference.path),
        content_hash=reference.content_hash,
        origin=origin,
        image_size=int(size) if size is not None else None,
        statistics={name: reference.statistics[name] for name in moments},
        features=found.features,
        labels=None,
        label_names=[],
        num_images=len(images) if images is not None and kept else None,
        extractor_hash=networks.extractor.weights_hash,
        cached=found.cached,
        warnings=found.warnings,
    )


@dataclass(frozen=True)
class _Found:
    statistics: dict[str, Gaussian]
    features: np.ndarray | None
    cached: bool | None
    warnings: list[str]


def _measure_or_load(
    source: ImageSource,
    content_hash: str,
    networks: Networks,
    moments: frozenset[str],
    kept: frozenset[str],
    options: SetOptions,
    cache: StatisticsCache | None,
) -> _Found:
    parts = _key_parts(networks, moments | kept, content_hash, options)
    warnings: list[str] = []
    arrays, lost = _load(cache, parts, moments, kept, warnings)
    cached = not lost
    if lost:
        measured = measure(
            source,
            networks,
            moments=moments,
            kept=kept,
            image_size=options.image_size,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            show_progress=options.show_progress,
            description="reference",
        )
        arrays = {}
        for name in sorted(moments):
            total = measured.moments(name).gaussian()
            arrays[f"moments/{name}"] = {"mu": total.mu, "sigma": total.sigma, "count": np.array([total.count], dtype=np.int64)}
        for name in sorted(kept):
            arrays[f"rows/{name}"] = {"rows": measured.rows[name]}
        _store(cache, parts, arrays)
    if not process_state().is_main_process:  # which alone computes scores
        return _Found({}, None, cached, [])
    statistics = {name: _gaussian(arrays[f"moments/{name}"]) for name in sorted(moments)}
    features = arrays["rows/pool"]["rows"] if "pool" in kept else None
    return _Found(statistics, features, cached if cache is not None else False, warnings)


def _key_parts(networks: Networks, names: frozenset[str], content_hash: str, options: SetOptions) -> dict[str, dict[str, str]]:
    """What decides each kind of row; every part of it is a part of the key."""
    parts = {}
    for name in names:
        network = networks.of(name)
        parts[name] = {
            "content": content_hash,
            "crop": options.crop,
            "extractor": network.name,
            "extractor_hash": network.weights_hash,
            "resize": network.resize,
            "rows": name,
        }
    return parts


Arrays = dict[str, dict[str, np.ndarray]]


def _load(
    cache: StatisticsCache | None,
    parts: Mapping[str, Mapping[str, str]],
    moments: frozenset[str],
    kept: frozenset[str],
    warnings: list[str],
) -> tuple[Arrays, bool]:
    """All entries (from the main process, so that all processes agree), and whether any was missing."""
    if cache is None:
        return {}, True
    arrays: Arrays = {}
    wanted = [*(("moments", name) for name in sorted(moments)), *(("rows", name) for name in sorted(kept))]
    if process_state().is_main_process:
        for kind, name in wanted:
            entry = cache.load({**parts[name], "kind": kind}, warnings)
            if entry is None:
                break
            arrays[f"{kind}/{name}"] = entry
    return arrays, not from_main(lambda: len(arrays) == len(wanted))


def _store(cache: StatisticsCache | None, parts: Mapping[str, Mapping[str, str]], arrays: Arrays) -> None:
    if cache is None or not process_state().is_main_process:
        return
    for entry, content in arrays.items():
        kind, _, name = entry.partition("/")
        cache.store({**parts[name], "kind": kind}, content)


def _gaussian(entry: Mapping[str, np.ndarray]) -> Gaussian:
    return Gaussian(entry["mu"], entry["sigma"], int(entry["count"][0]))


def _check_facts(file: ReferenceFile, names: frozenset[str], networks: Networks) -> None:
    """Refuse our own statistics of another extractor; files of other codes do not say whose they are."""
    stored = file.facts.get("networks", {})
    for name, identity in networks.identities(names).items():
        if name in stored and stored[name] != identity:
            (their_name, their_hash), (our_name, our_hash) = stored[name].split(), identity.split()
            raise UserError(
                f"{file.path}: was measured with '{their_name}' ({their_hash[:12]}), these scores use '{our_name}' ({our_hash[:12]}); "
                "measure it again with genvision statistics"
            )
