"""What the probes classify: codes and small pixels of images, and the pooled hidden states of a generator that reads the codes.

Shapes: N images, B images of a batch, L codes of an image, P positions of the condition, C channels of a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.data.datasets import ordered_batches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.progress import Progress, track

PIXEL_SIDE = 16
"""The baseline of pixels looks at images of at most this side."""


class ImageCodes(NamedTuple):
    """A set as the probes read it."""

    codes: Tensor
    """int64 [N, L], or latents float32 [N, c, ...]"""
    pixels: Tensor
    """float32 [N, D]: images of at most PIXEL_SIDE x PIXEL_SIDE pixels."""
    labels: Tensor
    """int64 [N]"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images become codes and hidden states."""

    generator: Any
    tokenizer: Any
    size: int
    batch_size: int
    num_workers: int
    device: str
    show_progress: bool

    def encode(self, source: ImageSource, indices: np.ndarray, description: str) -> ImageCodes:
        """Codes, small pixels and labels of the images at `indices`; refuses a tokenizer that makes another number of codes."""
        codes, pixels, labels = [], [], []
        progress = Progress(len(indices), description, show=self.show_progress)
        for batch in ordered_batches(source, self.size, batch_size=self.batch_size, indices=indices, num_workers=self.num_workers):
            images = from_uint8(batch["images"])
            found = self.tokenizer.encode(images.to(self.device)).cpu()
            made, read = list(found.shape[1:]), list(self.generator.code_shape)
            if made != read:
                raise UserError(f"the tokenizer makes codes of shape {made}, the generator reads {read}; use the tokenizer of its training")
            codes.append(found if found.is_floating_point() else found.flatten(1))
            pixels.append(_shrunk(images).flatten(1))
            labels.append(torch.from_numpy(batch["labels"]))
            progress.advance(len(images))
        progress.close()
        return ImageCodes(torch.cat(codes), torch.cat(pixels), torch.cat(labels))

    def tokens(self, codes: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states [B, P + L, C] of each layer, float32 on the device."""
        with torch.no_grad():
            return [states.float() for states in self.generator.hidden_states(codes.to(self.device), layers)]

    def pool(self, codes: Tensor, layers: Sequence[int], poolings: Sequence[str], description: str) -> dict[tuple[int, str], Tensor]:
        """(layer, pooling) to features float32 [N, C] on the CPU."""
        parts: dict[tuple[int, str], list[Tensor]] = {(layer, pooling): [] for layer in layers for pooling in poolings}
        for batch in self.batches(codes, description):
            for layer, states in zip(layers, self.tokens(batch, layers), strict=True):
                for pooling in poolings:
                    parts[layer, pooling].append(pool_states(states, pooling, self.generator.prefix_length).cpu())
        return {key: torch.cat(found) for key, found in parts.items()}

    def batches(self, codes: Tensor, description: str) -> Iterator[Tensor]:
        """Some images at a time, with progress."""
        chunks = codes.split(self.batch_size)
        return track(chunks, len(chunks), description, unit="batches", show=self.show_progress)


def pool_states(states: Tensor, pooling: str, prefix_length: int) -> Tensor:
    """Hidden states [B, P + L, C] -> [B, C]: the mean over the image's positions, or over those of the condition (`class`)."""
    return states[:, prefix_length:].mean(dim=1) if pooling == "mean" else states[:, :prefix_length].mean(dim=1)


def _shrunk(images: Tensor) -> Tensor:
    side = images.shape[-1]
    return images if side <= PIXEL_SIDE else F.interpolate(images, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
