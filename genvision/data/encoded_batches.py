"""What is stored of every batch of images: the codes, deviations and features of every view, and the checks that they pass.

Shapes: images [B, V, H, W, 3] of B images with V views; codes and deviations [B, V, *code_shape]; features [B, V, T, Z].
"""

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from genvision.data.code_storage import code_dtype
from genvision.data.datasets import OrderedBatches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.progress import Progress


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def spec(self) -> Any: ...

    @property
    def device(self) -> Any: ...

    def encode(self, images: Tensor) -> Tensor: ...


class PosteriorEncoder(Protocol):
    """What is needed of a tokenizer whose posterior is stored."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class FeatureNetwork(Protocol):
    """What is needed of a network whose features are stored: genvision.data.alignment.FrozenFeatures."""

    name: str
    hash: str
    tokens_per_side: int
    dim: int

    def __call__(self, images: Tensor) -> Tensor: ...


class EncodedBatch(NamedTuple):
    """One batch as it is stored; B may be 0, then there are no parts."""

    parts: dict[str, np.ndarray]
    """`codes`, and `deviations` and `features` where they are asked for, each [B, V, ...]."""
    labels: np.ndarray
    """int64 [B]"""


def encode_batches(
    tokenizer: Encoder,
    features: FeatureNetwork | None,
    stream: OrderedBatches,
    source: ImageSource,
    job: dict[str, Any],
    progress: Progress,
) -> Generator[EncodedBatch, None, None]:
    """What is stored of every chunk of the stream."""
    for chunk, batch in zip(stream.chunks, stream, strict=True):
        images = batch["images"]  # [B, V, H, W, 3]
        num, views = images.shape[:2]
        parts: dict[str, np.ndarray] = {}
        if num:
            with torch.inference_mode():
                flat = from_uint8(images.reshape(num * views, *images.shape[2:])).to(tokenizer.device)
                made = _encoded(tokenizer, features, flat, job)
            parts = {part: _as_stored(part, values, job).reshape(num, views, *values.shape[1:]) for part, values in made.items()}
            for part, stored in parts.items():
                _check_finite(part, stored, source, batch["indices"])
        progress.advance(len(chunk))
        yield EncodedBatch(parts, batch["labels"])


def _encoded(tokenizer: Encoder, features: FeatureNetwork | None, images: Tensor, job: dict[str, Any]) -> dict[str, Tensor]:
    """The parts of what is stored of some images [N, 3, H, W], each [N, ...]."""
    if job.get("posterior"):
        codes, deviations = cast(PosteriorEncoder, tokenizer).posterior(images)
        parts = {"codes": codes, "deviations": deviations}
    else:
        parts = {"codes": tokenizer.encode(images)}
    return parts if features is None else parts | {"features": features(images)}


def _as_stored(part: str, values: Tensor, job: dict[str, Any]) -> np.ndarray:
    array: np.ndarray
    if part == "features" or job["kind"] == "latents":
        array = values.to(torch.float16 if part == "features" else getattr(torch, job["dtype"])).cpu().numpy()
        return array
    array, size = values.cpu().numpy(), job["codebook_size"]
    assert array.min() >= 0 and array.max() < size, "the tokenizer made a code outside its codebook"
    return array.astype(code_dtype(size))


def _check_finite(part: str, stored: np.ndarray, source: ImageSource, indices: np.ndarray) -> None:
    """Refuse NaN, and what is too large for the numbers that store it, by the name of the image."""
    if stored.dtype.kind != "f" or (finite := np.isfinite(stored.reshape(len(stored), -1)).all(1)).all():
        return
    what = "latents" if part == "codes" else part
    if part == "features":
        mend = "take other weights of the feature network"
    else:
        mend = "encode with dtype float32" if stored.dtype == np.float16 else "the tokenizer is broken, take an earlier checkpoint"
    name = source.name(int(indices[int(np.argmin(finite))]))
    raise UserError(f"{name}: its {what} are NaN, infinite or too large for {stored.dtype}; {mend}")
