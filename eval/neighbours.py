"""Does a generator copy its training images? The nearest training image of each generated one, by features and by pixels.

A small distance alone says little: smooth or common images are near to others by nature. So held-out real images are put beside the
generated ones. Where nothing is memorised both are equally far from the training set; the share of generated images that are nearer
than 1 % or 5 % of the held-out ones are is then about 1 % or 5 %.

The training set streams by once, in bounded memory: for each query only the n nearest so far are kept.

Shapes: Q queries (generated, then held-out), n neighbours, B images of a batch, D values of an image in a space.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.data.order import epoch_order
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.accuracy import wilson_interval
from genvision.eval.features import Extractor, as_pixels, exact_float32
from genvision.eval.hygiene import hash_images
from genvision.eval.job import software_versions
from genvision.eval.nearest_search import Neighbourhood, RunningNearest
from genvision.eval.report import format_table
from genvision.eval.sets import find_image_size, stream_batches

SCHEMA = "genvision.neighbours/1"
Metric = Literal["cosine", "l2"]
Interval = tuple[float, float]
PIXEL_SIDE = 32
"""Pixels are compared at most at this side (averaged over areas): small shifts of fine detail count less, and memory stays small."""
PERCENTILES = (1, 5)
NUM_RESAMPLES = 1000
INTERVAL_METHOD = "95 %, bootstrap of generated and held-out images (1,000 resamples), shares at least as wide as Wilson's interval"
ENOUGH_HELD_OUT = 500
"""Below this the first percentile rests on fewer than five images."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig:
    """What is searched."""

    num: int = 1000
    """Generated images, drawn at random without replacement; and as many held-out ones."""
    num_neighbours: int = 5
    """Training images that are kept for each."""
    metric: Metric = "cosine"
    """Of features: 1 - cosine, or the Euclidean distance. Pixels are always compared by root mean square difference, in levels of 255."""
    batch_size: int = 64
    seed: int = 0
    """Of the images that are drawn."""

    def __post_init__(self) -> None:
        for name, value in (("num", self.num), ("num_neighbours", self.num_neighbours), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.metric not in ("cosine", "l2"):
            raise UserError(f"metric '{self.metric}' is unknown; choose cosine or l2")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number of at least 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class NeighboursResult:
    """How near generated images are to training images, and what that depends on. None: not measured."""

    schema: str = SCHEMA

    copies: int
    """Generated images that equal a training image in every pixel."""
    held_out_copies: int | None = None
    """The same of held-out images: they are in the training set, too."""
    features_below_p1: float | None = None
    """Share of generated images whose nearest training image is nearer than the first percentile of the held-out distances."""
    features_below_p5: float | None = None
    features_nearer: float | None = None
    """Chance that a generated image is nearer to the training set than a held-out one; 0.5 if nothing is memorised."""
    pixels_below_p1: float | None = None
    pixels_below_p5: float | None = None
    pixels_nearer: float | None = None

    features_below_p1_interval: Interval | None = None
    features_below_p5_interval: Interval | None = None
    features_nearer_interval: Interval | None = None
    pixels_below_p1_interval: Interval | None = None
    pixels_below_p5_interval: Interval | None = None
    pixels_nearer_interval: Interval | None = None
    interval_method: str = INTERVAL_METHOD

    quantiles: list[float]
    features_distances: list[float] | None = None
    """Quantiles of the distances from generated images to their nearest training image."""
    features_held_out_distances: list[float] | None = None
    pixels_distances: list[float]
    pixels_held_out_distances: list[float] | None = None
    nearest: list[dict[str, Any]]
    """The generated images of the sheet with their neighbours: image, name, and for each space the names and distances."""

    num_generated: int
    num_held_out: int | None = None
    num_train: int
    num_neighbours: int
    generated: str
    generated_hash: str
    train: str
    train_hash: str
    held_out: str | None = None
    held_out_hash: str | None = None
    image_size: int
    crop: str
    extractor: str | None = None
    extractor_hash: str | None = None
    feature_dim: int | None = None
    resize: str | None = None
    features_metric: str | None = None
    pixels_metric: str
    seed: int

    batch_size: int
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class NeighbourSearch:
    """What `find_neighbours` gives."""

    result: NeighboursResult
    generated: np.ndarray
    """int64 [K], which generated images were taken."""
    held_out: np.ndarray | None
    """int64 [M], likewise."""
    spaces: dict[str, Neighbourhood]
    """`features` (unless there is no extractor) and `pixels`; generated images first, then held-out ones."""

    def nearest_distances(self, space: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Distances to the nearest training image: of generated [K] and of held-out images [M]."""
        nearest = self.spaces[space].distances[:, 0]
        num = len(self.generated)
        return nearest[:num], None if self.held_out is None else nearest[num:]


def find_neighbours(
    generated: ImageSource,
    train: ImageSource,
    *,
    held_out: ImageSource | None = None,
    extractor: Extractor | None = None,
    image_size: int | None = None,
    config: NeighbourConfig | None = None,
    num_workers: int = 0,
    num_shown: int = 16,
    show_progress: bool = False,
) -> NeighbourSearch:
    """Search the training set for what generated images resemble.

    Args:
        held_out: real images that the generator has not seen.
        extractor: for the space of features; None compares pixels only.
        image_size: side to which all images are cropped; that of the generated ones unless told.
        num_shown: generated images whose neighbours the result names.

    Raises:
        UserError: images cannot be read or differ in size, or there are fewer training images than neighbours.
    """
    began = time.monotonic()
    config = config or NeighbourConfig()
    if len(train) < config.num_neighbours:
        raise UserError(f"{train.spec}: holds {len(train):,} images, fewer than the {config.num_neighbours} neighbours asked for")
    size = find_image_size(generated, image_size)
    for other in (train, *([held_out] if held_out is not None else [])):
        if (side := find_image_size(other, image_size)) != size:
            raise UserError(
                f"{generated.spec} has images of {size}x{size} pixels, {other.spec} of {side}x{side}; "
                "give --image-size to crop all to one size"
            )
    taken = _draw(generated, config)
    taken_real = None if held_out is None else _draw(held_out, config)
    streams = {"batch_size": config.batch_size, "num_workers": num_workers, "show_progress": show_progress}

    queries: dict[str, list[Tensor]] = {}
    hashes: list[np.ndarray] = []
    sets = [(generated, taken, "generated")] + ([(held_out, taken_real, "held-out")] if held_out is not None else [])
    for source, indices, description in sets:
        for batch in stream_batches(source, image_size, indices=indices, description=description, **streams):  # type: ignore[arg-type]
            hashes.append(hash_images(batch.images))
            for space, rows in _spaces(batch.images, extractor).items():
                queries.setdefault(space, []).append(rows)
    metrics: dict[str, Any] = {"features": config.metric, "pixels": "rms"}
    searches = {space: RunningNearest(torch.cat(rows), config.num_neighbours, metrics[space]) for space, rows in queries.items()}
    query_hashes = [row.tobytes() for row in np.concatenate(hashes)]
    wanted, met = set(query_hashes), set[bytes]()
    for batch in stream_batches(train, image_size, description="training", **streams):  # type: ignore[arg-type]
        met |= wanted & {row.tobytes() for row in hash_images(batch.images)}
        with exact_float32():
            for space, rows in _spaces(batch.images, extractor).items():
                searches[space].update(rows, batch.indices)
    copied = np.array([row in met for row in query_hashes])
    spaces = {space: search.finish() for space, search in searches.items()}

    num = len(taken)
    warnings = _warnings(copied[:num], copied[num:], taken_real, held_out)
    scores: dict[str, Any] = {}
    for space, found in spaces.items():
        nearest = found.distances[:, 0]
        scores |= _scores(space, nearest[:num], nearest[num:] if held_out is not None else None, config.seed)
    result = NeighboursResult(
        copies=int(copied[:num].sum()),
        held_out_copies=None if held_out is None else int(copied[num:].sum()),
        quantiles=list(QUANTILES),
        nearest=_name_nearest(shown_rows(spaces, num, num_shown), taken, generated, train, spaces),
        num_generated=num,
        num_held_out=None if taken_real is None else len(taken_real),
        num_train=len(train),
        num_neighbours=config.num_neighbours,
        generated=generated.spec,
        generated_hash=generated.content_hash(),
        train=train.spec,
        train_hash=train.content_hash(),
        held_out=None if held_out is None else held_out.spec,
        held_out_hash=None if held_out is None else held_out.content_hash(),
        image_size=size,
        crop="none" if image_size is None else f"ADM centre crop to {size}",
        extractor=extractor.name if extractor else None,
        extractor_hash=extractor.weights_hash if extractor else None,
        feature_dim=extractor.feature_dim if extractor else None,
        resize=extractor.resize if extractor else None,
        features_metric=({"cosine": "1 - cosine", "l2": "Euclidean distance"}[config.metric]) if extractor else None,
        pixels_metric=f"root mean square difference in levels of 0 .. 255, at {min(size, PIXEL_SIDE)}x{min(size, PIXEL_SIDE)} pixels",
        seed=config.seed,
        batch_size=config.batch_size,
        device=extractor.device if extractor else "cpu",
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        notes=["smooth images are near to many by pixels, whatever they show: look at the sheet before you call one a copy"],
        warnings=warnings,
        **scores,
    )
    return NeighbourSearch(result=result, generated=taken, held_out=taken_real, spaces=spaces)


def format_neighbours(result: NeighboursResult) -> str:
    """The facts of a result, without the names of single images."""
    return "\n".join(line for line in format_table(result).splitlines() if not line.startswith("nearest "))


def shown_rows(spaces: Mapping[str, Neighbourhood], num: int, num_shown: int) -> list[int]:
    """Generated images for the sheet, as places among the queries: half of them the nearest to the training set, in each space by turns;
    then others evenly spread."""
    num_shown = min(num, num_shown)
    ranked = [np.argsort(found.distances[:num, 0], kind="stable").tolist() for found in spaces.values()]
    by_turns = dict.fromkeys(row for rows in zip(*ranked, strict=True) for row in rows)
    rows = list(by_turns)[: (num_shown + 1) // 2]
    others = [row for row in range(num) if row not in rows]
    count = num_shown - len(rows)
    return rows + [others[i] for i in np.linspace(0, len(others) - 1, count).round().astype(int)] if count else rows


def _draw(source: ImageSource, config: NeighbourConfig) -> np.ndarray:
    return np.sort(epoch_order(config.seed, 0, len(source))[: config.num])


def _spaces(images: np.ndarray, extractor: Extractor | None) -> dict[str, Tensor]:
    """uint8 [B, S, S, 3] -> space to float32 [B, D]; features first."""
    rows = {} if extractor is None else {"features": extractor(images, want_logits=False, want_spatial=False).features}
    pixels = as_pixels(images).float()
    side = pixels.shape[-1]
    if side > PIXEL_SIDE:
        pixels = F.interpolate(pixels, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
    rows["pixels"] = pixels.flatten(1) - 127.5  # smaller numbers keep more digits in the expansion of squares
    if extractor is not None:
        rows = {space: tensor.to(extractor.device) for space, tensor in rows.items()}
    return rows


def _scores(space: str, generated: np.ndarray, held_out: np.ndarray | None, seed: int) -> dict[str, Any]:
    """The fields of one space."""
    found: dict[str, Any] = {f"{space}_distances": np.quantile(generated, QUANTILES).tolist()}
    if held_out is None:
        return found
    found[f"{space}_held_out_distances"] = np.quantile(held_out, QUANTILES).tolist()
    rng = np.random.default_rng(seed)
    resampled = [(rng.choice(generated, len(generated)), rng.choice(held_out, len(held_out))) for _ in range(NUM_RESAMPLES)]
    for percent in PERCENTILES:
        share = share_below(generated, held_out, percent)
        found[f"{space}_below_p{percent}"] = share
        # the percentile itself is a guess, which Wilson's interval takes for the truth; the bootstrap fails where the share is 0 or 1
        low, high = wilson_interval(round(share * len(generated)), len(generated))
        less, more = _middle([share_below(mine, real, percent) for mine, real in resampled])
        found[f"{space}_below_p{percent}_interval"] = min(low, less), max(high, more)
    found[f"{space}_nearer"] = share_nearer(generated, held_out)
    found[f"{space}_nearer_interval"] = _middle([share_nearer(mine, real) for mine, real in resampled])
    return found


def _middle(values: list[float]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def share_below(generated: np.ndarray, held_out: np.ndarray, percent: float) -> float:
    """Share of `generated` [K] below a percentile of `held_out` [M]."""
    return float((generated < np.percentile(held_out, percent)).mean())


def share_nearer(generated: np.ndarray, held_out: np.ndarray) -> float:
    """Chance that one of `generated` [K] is smaller than one of `held_out` [M]; ties count half."""
    order = np.sort(held_out)
    smaller = len(order) - np.searchsorted(order, generated, side="right")
    equal = np.searchsorted(order, generated, side="right") - np.searchsorted(order, generated, side="left")
    return float((smaller + 0.5 * equal).mean() / len(order))


def _warnings(copied: np.ndarray, held_out_copied: np.ndarray, taken_real: np.ndarray | None, held_out: ImageSource | None) -> list[str]:
    warnings = []
    if copied.any():
        warnings.append(f"{int(copied.sum()):,} of {len(copied):,} generated images equal a training image in every pixel")
    if held_out is None or taken_real is None:
        warnings.append("no held-out images were given: without them nobody can say whether these distances are small")
        return warnings
    if held_out_copied.any():
        where = f"{int(held_out_copied.sum()):,} of {len(held_out_copied):,} held-out images"
        warnings.append(f"{where} are in the training set: the distances of held-out images are too small")
    if len(taken_real) < ENOUGH_HELD_OUT:
        warnings.append(f"{len(taken_real):,} held-out images are few: their first percentile is uncertain below {ENOUGH_HELD_OUT}")
    return warnings


def _name_nearest(
    rows: list[int], taken: np.ndarray, generated: ImageSource, train: ImageSource, spaces: Mapping[str, Neighbourhood]
) -> list[dict[str, Any]]:
    named: Callable[[np.ndarray], list[str]] = lambda indices: [train.name(int(index)) for index in indices]  # noqa: E731
    return [
        {
            "image": int(taken[row]),
            "name": generated.name(int(taken[row])),
            **{space: {"names": named(found.indices[row]), "distances": found.distances[row].tolist()} for space, found in spaces.items()},
        }
        for row in rows
    ]
