"""Randomness of sampling jobs: image `index` of a job draws from streams made of (seed, index) alone (genvision.streams)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from genvision.streams import IndexedStreams, Purpose


class ImageStreams(IndexedStreams):
    """The streams of some images of one job.

    Args:
        seed: of the job, 0 .. 2^64 - 1.
        indices: which images; their order is the row order of everything drawn.
    """


def draw_labels(seed: int, indices: Iterable[int], classes: list[int]) -> Tensor:
    """A label for each image, uniform over `classes`, from the image's own stream: int64 [B]."""
    u = ImageStreams(seed, indices).uniform(Purpose.LABEL, 1)[:, 0]
    return torch.tensor(classes)[(u * len(classes)).long()]
