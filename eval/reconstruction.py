"""How much a tokenizer loses: rFID, PSNR, SSIM and the use of its codebook, from one pass over a set of images.

Originals and reconstructions are the same crops, as uint8: rFID compares a set with its own reconstructions, never with the
statistics of another set.
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
from torch import Tensor, nn

from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.features import Extractor
from genvision.eval.job import small_sample_warning, software_versions
from genvision.eval.metrics import Moments, frechet_distance, psnr, ssim
from genvision.eval.sets import stream_images
from genvision.images import Rounding, from_uint8, make_grid, to_uint8
from genvision.tokenizers.quantizers import CodebookUsage


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

    rfid: float | None
    psnr: float
    ssim: float
    ssim_range2: float
    codebook_usage: float | None
    codebook_perplexity: float | None
    codebook_size: int | None
    num_images: int
    data: str
    data_fingerprint: str
    image_size: int
    crop: str
    rounding: str
    extractor: str | None
    extractor_hash: str | None
    feature_dim: int | None
    resize: str | None
    batch_size: int
    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What `reconstruct` gives."""

    result: ReconstructionResult
    originals: np.ndarray
    """The first images, uint8 [k, H, W, 3]."""
    reconstructions: np.ndarray
    """The same, after the tokenizer."""

    def grid(self, columns: int = 8) -> Image.Image:
        """A picture of the pairs: a row of originals, the row of their reconstructions below, and so on."""
        return pair_grid(self.originals, self.reconstructions, columns)


def reconstruct(
    tokenizer: Tokenizer,
    source: ImageSource,
    *,
    image_size: int,
    extractor: Extractor | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "cpu",
    rounding: Rounding = "trunc127.5",
    num_images: int | None = None,
    num_pairs: int = 8,
    show_progress: bool = False,
) -> Reconstruction:
    """Encode and decode every image, and measure what comes back.

    Args:
        tokenizer: on `device` already; a module is in eval mode meanwhile.
        image_size: both sides of ADM's centre crop.
        extractor: for rFID; None leaves rFID out.
        num_images: measure the first so many only; None measures all.
        num_pairs: so many first images come back with their reconstructions.

    Raises:
        UserError: fewer than 2 images, or the tokenizer changes their size.
    """
    num_measured = len(source) if num_images is None else min(num_images, len(source))
    if num_measured < 2:
        raise UserError(f"{source.spec}: a reconstruction needs at least 2 images, got {num_measured}; give more images")
    began = time.monotonic()
    moments = [Moments(extractor.feature_dim) for _ in range(2)] if extractor else []
    usage = CodebookUsage(tokenizer.spec.codebook_size) if tokenizer.spec.codebook_size is not None else None
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    scores = []
    with torch.no_grad(), _eval_mode(tokenizer):
        for originals, _ in stream_images(
            source,
            image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            num_images=num_images,
            show_progress=show_progress,
            description="reconstruct",
        ):
            codes = tokenizer.encode(from_uint8(originals).to(device))
            if usage:
                usage.update(codes)
            images = to_uint8(tokenizer.decode(codes), rounding)
            if images.shape != originals.shape:
                raise UserError(
                    f"the tokenizer made {list(images.shape[1:3])} pixels of {image_size}; choose a multiple of its downsampling"
                )
            scores.append(np.stack([psnr(originals, images), ssim(originals, images), ssim(originals, images, data_range=2.0)]))
            if extractor:
                for side, batch in zip(moments, (originals, images), strict=True):
                    side.update(extractor(batch).features)
            if sum(len(pair[0]) for pair in pairs) < num_pairs:
                pairs.append((originals, images))
    warning = small_sample_warning(num_measured, f"the set {source.spec}", extractor) if extractor else None
    warnings = [warning] if warning else []
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    codebook = usage.summary() if usage else {}
    means = np.concatenate(scores, axis=1).mean(axis=1)
    result = ReconstructionResult(
        rfid=frechet_distance(*moments) if extractor else None,
        psnr=float(means[0]),
        ssim=float(means[1]),
        ssim_range2=float(means[2]),
        codebook_usage=codebook.get("usage"),
        codebook_perplexity=codebook.get("perplexity"),
        codebook_size=tokenizer.spec.codebook_size,
        num_images=num_measured,
        data=source.spec,
        data_fingerprint=source.fingerprint(),
        image_size=image_size,
        crop=f"ADM centre crop to {image_size}",
        rounding=rounding,
        extractor=extractor.name if extractor else None,
        extractor_hash=extractor.weights_hash if extractor else None,
        feature_dim=extractor.feature_dim if extractor else None,
        resize=extractor.resize if extractor else None,
        batch_size=batch_size,
        device=device,
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        warnings=warnings,
    )
    first, second = (np.concatenate(side)[:num_pairs] for side in zip(*pairs, strict=True))
    return Reconstruction(result=result, originals=first, reconstructions=second)


def pair_grid(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> Image.Image:
    """uint8 [k, H, W, 3] twice -> rows of originals, each with the row of its reconstructions below."""
    columns = min(columns, len(originals))
    rows = -(-len(originals) // columns)
    white = np.full((rows * columns - len(originals), *originals.shape[1:]), 255, dtype=np.uint8)
    sides = [np.concatenate([side, white]).reshape(rows, columns, *side.shape[1:]) for side in (originals, reconstructions)]
    sheet = np.stack(sides, axis=1).reshape(-1, *originals.shape[1:])
    return make_grid(sheet, columns, row_names=["original", "reconstruction"] * rows)


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
