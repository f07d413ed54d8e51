"""How much a tokenizer loses: rFID, PSNR, SSIM, LPIPS and the use of its codebook, from one pass over a set of images.

Originals and reconstructions are the same crops, as uint8: rFID compares a set with its own reconstructions, never with the
statistics of another set. Every process takes its share of the batches; a batch holds the same images whatever the number of processes.

Shapes: N images, B images of a batch, K codes.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student_t
from torch import Tensor, nn

from genvision.data.datasets import ordered_batches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.confidence import paired_interval
from genvision.eval.distributed import gather_rows
from genvision.eval.features import Extractor, exact_float32, tensors_hash
from genvision.eval.hygiene import hash_images
from genvision.eval.job import software_versions
from genvision.eval.measurement import Measurement
from genvision.eval.moments import frechet_distance, merged
from genvision.eval.pairs import Measure, PairKeeper, Pairs, pair_sheet
from genvision.eval.pixels import PSNR_RANGE, psnr, ssims
from genvision.images import Rounding, from_uint8, to_uint8
from genvision.processes import process_state
from genvision.progress import Progress
from genvision.tokenizers.codebook import CodebookUsage
from genvision.tokenizers.lpips import LPIPS
from genvision.tokenizers.perceptual import TimmPerceptual

Interval = tuple[float, float]
SCHEMA = "genvision.reconstruction/1"
SSIM_RANGES = {"ssim": 1.0, "ssim_range2": 2.0}
LPIPS_IMAGES = 8
"""Pairs that go through VGG16 at once; 256 pixels of a pair take 130 MB there."""
RANKINGS: dict[str, Measure] = {"lpips": "LPIPS", "perceptual": "distance", "psnr": "PSNR"}
"""What worst and best pairs are found by, to its name in pictures."""
PUBLISHED_IMAGES = 50_000
"""The validation images of ImageNet, of which published rFIDs are."""
INTERVAL_METHOD = "95 %, Student's t: rFID by a delete-a-block jackknife over pairs, the rest by the standard error of the mean over images"


class Tokenizer(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def spec(self) -> Any:
        """Has `codebook_size`: an int, or None where codes are continuous."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ReconstructionResult:
    """Scores of a tokenizer on one set, and what they depend on; docs/evaluation.md explains every field. None: not measured."""

    schema: str = SCHEMA

    rfid: float | None = None
    psnr: float
    ssim: float
    ssim_range2: float
    lpips: float | None = None
    perceptual: float | None = None
    codebook_usage: float | None = None
    codebook_perplexity: float | None = None
    codebook_entropy: float | None = None

    rfid_interval: Interval | None = None
    psnr_interval: Interval | None = None
    ssim_interval: Interval | None = None
    ssim_range2_interval: Interval | None = None
    lpips_interval: Interval | None = None
    perceptual_interval: Interval | None = None
    interval_method: str = INTERVAL_METHOD

    codebook_size: int | None = None
    num_codes: int | None = None
    num_dead_codes: int | None = None
    codebook_top_share: float | None = None

    num_images: int
    data: str
    data_fingerprint: str
    image_size: int
    crop: str
    rounding: str
    tokenizer: str | None = None
    tokenizer_hash: str | None = None

    extractor: str | None = None
    extractor_hash: str | None = None
    feature_dim: int | None = None
    resize: str | None = None
    lpips_network: str | None = None
    lpips_hash: str | None = None
    perceptual_network: str | None = None
    perceptual_hash: str | None = None
    psnr_data_range: float = PSNR_RANGE
    ssim_data_range: float = SSIM_RANGES["ssim"]
    feature_dtype: str = "float32"
    statistics_dtype: str = "float64"

    num_processes: int = 1
    batch_size: int
    device: str
    seconds: float
    images_per_second: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What `reconstruct` gives."""

    result: ReconstructionResult
    pairs: list[Pairs]
    """The first pairs of the set, the worst and the best."""
    code_counts: np.ndarray | None = None
    """int64 [K], how often each code occurred; None for continuous codes."""

    def grid(self, columns: int = 8) -> Image.Image:
        """A picture of the pairs with their values."""
        return pair_sheet(self.pairs, columns)


def reconstruct(
    tokenizer: Tokenizer,
    source: ImageSource,
    *,
    image_size: int,
    extractor: Extractor | None = None,
    lpips: LPIPS | None = None,
    perceptual: TimmPerceptual | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    rounding: Rounding = "trunc127.5",
    num_images: int | None = None,
    num_pairs: int = 8,
    tokenizer_name: str | None = None,
    tokenizer_hash: str | None = None,
    show_progress: bool = False,
) -> Reconstruction:
    """Encode and decode every image, and measure what comes back.

    Args:
        tokenizer: on `device` already; a module is in eval mode meanwhile.
        image_size: both sides of ADM's centre crop.
        extractor: for rFID; None leaves rFID out.
        lpips: on `device` already; None leaves LPIPS out.
        perceptual: the same of the distance on the features of a timm model.
        num_images: measure the first so many only; None measures all.
        num_pairs: so many first, worst and best pairs come back; worst and best by LPIPS, or the other distance, or PSNR.

    Returns:
        The same on every process, and but for the last bits of sums whatever their number.

    Raises:
        UserError: fewer than 2 images, an image that cannot be read, or a tokenizer that changes their size or gives no finite numbers.
    """
    if batch_size < 1 or num_pairs < 1:
        raise UserError(f"batch_size and num_pairs must be at least 1, got {batch_size} and {num_pairs}")
    num = len(source) if num_images is None else min(num_images, len(source))
    if num < 2:
        raise UserError(f"{source.spec}: a reconstruction needs at least 2 images, got {num}; give more images")
    state = process_state(device)
    began = time.monotonic()
    indices = np.arange(num)
    share = indices[indices // batch_size % state.num_processes == state.process_index]
    seen = _Seen(tokenizer.spec.codebook_size, extractor, {"lpips": lpips, "perceptual": perceptual}, device, num_pairs)
    progress = Progress(len(share), "reconstruct", show=show_progress and state.is_main_process)
    with torch.no_grad(), _eval_mode(tokenizer):
        for batch in ordered_batches(source, image_size, batch_size=batch_size, num_workers=num_workers, indices=share):
            codes = tokenizer.encode(from_uint8(batch["images"]).to(device))
            images = _to_pixels(tokenizer.decode(codes), image_size, rounding)
            seen.add(batch["indices"], codes, batch["images"], images)
            progress.advance(len(images))
    progress.close()
    scores, pairs, counts = seen.finish(num)
    seconds = time.monotonic() - began
    warnings = _warnings(num, source, extractor, lpips)
    if state.is_main_process:
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr, flush=True)
    result = ReconstructionResult(
        **scores,
        codebook_size=tokenizer.spec.codebook_size,
        num_images=num,
        data=source.spec,
        data_fingerprint=source.fingerprint(),
        image_size=image_size,
        crop=f"ADM centre crop to {image_size}",
        rounding=rounding,
        tokenizer=tokenizer_name,
        tokenizer_hash=tokenizer_hash,
        extractor=extractor.name if extractor else None,
        extractor_hash=extractor.weights_hash if extractor else None,
        feature_dim=extractor.feature_dim if extractor else None,
        resize=extractor.resize if extractor else None,
        lpips_network=f"VGG16, {'linear layers of version 0.1' if lpips.is_published else 'unknown linear layers'}" if lpips else None,
        lpips_hash=tensors_hash(lpips.state_dict()) if lpips else None,
        perceptual_network=perceptual.description if perceptual else None,
        perceptual_hash=tensors_hash(perceptual.state_dict()) if perceptual else None,
        num_processes=state.num_processes,
        batch_size=batch_size,
        device=device,
        seconds=round(seconds, 2),
        images_per_second=round(num / seconds, 2),
        versions=software_versions(),
        notes=_notes(image_size, extractor, lpips, tokenizer.spec.codebook_size),
        warnings=warnings,
    )
    return Reconstruction(result=result, pairs=pairs, code_counts=counts)


class _Seen:
    """What this process has seen so far, and how all processes put it together."""

    def __init__(
        self,
        codebook_size: int | None,
        extractor: Extractor | None,
        distances: dict[str, LPIPS | TimmPerceptual | None],
        device: str,
        num_pairs: int,
    ) -> None:
        self.extractor, self.device = extractor, device
        self.distances = {name: network for name, network in distances.items() if network is not None}
        self.usage = CodebookUsage(codebook_size) if codebook_size is not None else None
        self.sides = [Measurement({"pool": extractor.feature_dim}, frozenset()) for _ in range(2)] if extractor else []
        """Of originals and of reconstructions."""
        self.indices: list[np.ndarray] = []
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in ("psnr", *SSIM_RANGES, *self.distances)}
        """float64 arrays [B] of every batch: one number a pair."""
        self.ranked_by = next(iter(self.distances), "psnr")
        self.pairs = PairKeeper(num_pairs, RANKINGS[self.ranked_by])

    def add(self, indices: np.ndarray, codes: Tensor, originals: np.ndarray, images: np.ndarray) -> None:
        """indices int64 [B] into the set, codes of any shape, both kinds of images uint8 [B, S, S, 3]."""
        if self.usage:
            self.usage.update(codes)
        if self.extractor:
            blocks = hash_images(originals)  # pairs stay together
            for measurement, side in zip(self.sides, (originals, images), strict=True):
                features = self.extractor(side, want_logits=False, want_spatial=False).features
                measurement.add(indices, {"pool": features.numpy()}, blocks)
        found = {"psnr": psnr(originals, images), **dict(zip(SSIM_RANGES, ssims(originals, images, [*SSIM_RANGES.values()]), strict=True))}
        found |= {name: _distances(network, originals, images, self.device) for name, network in self.distances.items()}
        for name, values in found.items():
            self.rows[name].append(values)
        self.indices.append(indices)
        self.pairs.update(indices, found[self.ranked_by], originals, images)

    def finish(self, num: int) -> tuple[dict[str, Any], list[Pairs], np.ndarray | None]:
        """Fields of the result, pairs and counts of codes of all processes together, on every process."""
        scores: dict[str, Any] = {}
        for name, values in gather_rows(self.rows, self.indices, num).items():
            scores[name], scores[f"{name}_interval"] = _mean_with_interval(values)
        if self.sides:
            first, second = (measurement.finish(num).blocks["pool"] for measurement in self.sides)
            scores["rfid"] = frechet_distance(merged(first), merged(second))
            scores["rfid_interval"] = paired_interval(first, second, scores["rfid"])
        counts = None
        if self.usage:
            usage = self.usage.sum_over_processes()
            summary, counts = usage.summary(), usage.counts.numpy()
            scores |= {f"codebook_{name}": summary[name] for name in ("usage", "perplexity")}
            scores |= {"codebook_entropy": summary["entropy_bits"], "codebook_top_share": usage.top_share()}
            scores |= {"num_codes": int(counts.sum()), "num_dead_codes": usage.num_dead}
        return scores, self.pairs.finish(num), counts


def _to_pixels(decoded: Tensor, image_size: int, rounding: Rounding) -> np.ndarray:
    if not bool(torch.isfinite(decoded).all()):
        raise UserError("the tokenizer gave pixels that are not finite; its weights are damaged or its training diverged")
    images = to_uint8(decoded, rounding)
    if images.shape[1:] != (image_size, image_size, 3):
        raise UserError(f"the tokenizer made {list(images.shape[1:3])} pixels of {image_size}; choose a multiple of its downsampling")
    return images


def _distances(network: LPIPS | TimmPerceptual, originals: np.ndarray, images: np.ndarray, device: str) -> np.ndarray:
    """float64 [B], a few pairs at a time."""
    parts = []
    for start in range(0, len(images), LPIPS_IMAGES):
        a, b = (from_uint8(side[start : start + LPIPS_IMAGES]).to(device) for side in (originals, images))
        with exact_float32():
            parts.append(network(a, b).double().cpu().numpy())
    values: np.ndarray = np.concatenate(parts)
    return values


def _mean_with_interval(values: np.ndarray) -> tuple[float, Interval | None]:
    """Mean of one number a pair, [N], and its 95 % interval; None where a number is infinite."""
    mean = float(values.mean())
    if not np.isfinite(mean):
        return mean, None
    half = float(student_t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean, (mean - half, mean + half)


def _warnings(num: int, source: ImageSource, extractor: Extractor | None, lpips: LPIPS | None) -> list[str]:
    lines = []
    if extractor and num < extractor.feature_dim:
        lines.append(
            f"the set {source.spec} has {num} images, fewer than the {extractor.feature_dim} features: rFID is biased upwards; "
            "compare it only with sets of the same size"
        )
    elif extractor and num < PUBLISHED_IMAGES and extractor.name != "digits":
        lines.append(
            f"published rFIDs are of {PUBLISHED_IMAGES:,} images; that of {num} reads higher, compare it only with sets of the same size"
        )
    if lpips and not lpips.is_published:
        lines.append("the linear layers of LPIPS are not those of version 0.1, so the values are no published LPIPS")
    return lines


def _notes(image_size: int, extractor: Extractor | None, lpips: LPIPS | None, codebook_size: int | None) -> list[str]:
    pixels = "PSNR takes pixels from 0 to 255; SSIM takes their range as 1 after division by 255, ssim_range2 as 2"
    return [
        f"rFID's reference is the same images, cropped in the same way (ADM centre crop to {image_size})"
        if extractor
        else "rFID not measured: no extractor",
        pixels,
        "LPIPS is of uint8 images scaled to [-1, 1]" if lpips else "LPIPS not measured: no weights were given",
        *(["codebook use not measured: codes are continuous"] if codebook_size is None else []),
    ]


@contextmanager
def _eval_mode(tokenizer: Tokenizer) -> Iterator[None]:
    """A module in train mode may update its codebook while it encodes."""
    was_training = isinstance(tokenizer, nn.Module) and tokenizer.training
    if isinstance(tokenizer, nn.Module) and was_training:
        tokenizer.eval()
    try:
        yield
    finally:
        if isinstance(tokenizer, nn.Module) and was_training:
            tokenizer.train()
