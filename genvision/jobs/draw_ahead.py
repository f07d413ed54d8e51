"""The images of a job, batch by batch; on CUDA the tokenizer decodes one batch while the next is drawn.

On a CPU both want the same cores: a thread that decodes beside the sampler gains nothing there, so the two take turns.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genvision.images import Rounding, to_uint8
from genvision.pipeline import ImagePipeline


class Wanted(Protocol):
    """Which images a job draws, and how."""

    @property
    def seed(self) -> int:
        """Of the job."""

    @property
    def rounding(self) -> Rounding:
        """How floats become bytes."""

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """int64 [B]."""


def draw_batches(
    pipeline: ImagePipeline, wanted: Wanted, chunks: Sequence[range], known: Tensor | None = None
) -> Iterator[tuple[range, np.ndarray]]:
    """Each chunk with its images, uint8 [B, H, W, 3].

    Args:
        chunks: numbers of the images of each batch.
        known: tokens that all images share, int64 [h, w], -1 where one is to be drawn.
    """
    beside = _DecoderBeside(pipeline, wanted.rounding) if pipeline.device.type == "cuda" else None
    under_way: tuple[range, Tensor] | None = None
    for chunk in chunks:
        rows = known.expand(len(chunk), *known.shape) if known is not None else None
        codes, _ = pipeline.draw_codes(wanted.labels_of(chunk), seed=wanted.seed, indices=chunk, known=rows)
        if beside is None:
            yield chunk, to_uint8(pipeline.decode(codes), wanted.rounding)
            continue
        if under_way is not None:  # decoded while these codes were drawn
            yield under_way[0], beside.finish(under_way[1])
        under_way = chunk, beside.begin(codes)
    if beside is not None and under_way is not None:
        yield under_way[0], beside.finish(under_way[1])


class _DecoderBeside:
    """Decodes on a CUDA stream of its own, so that the kernels of the next batch's sampling need not wait for it."""

    def __init__(self, pipeline: ImagePipeline, rounding: Rounding) -> None:
        self.pipeline, self.rounding = pipeline, rounding
        self.stream = torch.cuda.Stream(pipeline.device)

    def begin(self, codes: Tensor) -> Tensor:
        """Launch the decoder behind the sampler's last kernel; gives images that only `finish` may read."""
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self.stream)  # else the next batch may be given this memory while the decoder reads it
        with torch.cuda.stream(self.stream):
            return self.pipeline.decode(codes)

    def finish(self, images: Tensor) -> np.ndarray:
        """uint8 [B, H, W, 3]; waits for the decoder's stream, and not for the sampler's."""
        with torch.cuda.stream(self.stream):
            return to_uint8(images, self.rounding)
