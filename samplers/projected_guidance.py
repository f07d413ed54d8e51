"""Adaptive projected guidance (APG, arXiv:2410.02416, section 4 and algorithm 1): strong guidance without oversaturation.

Letters: D_c and D_b are the clean images as the condition and the base predict them, D = D_c - D_b. A running sum of D (momentum beta)
is cut to norm r and split along D_c; what is added to D_c is (s - 1) (orthogonal part + eta parallel part). eta = 1, no limit and no
momentum give D_b + s D, classifier-free guidance.
"""

import torch
from torch import Tensor

from genvision.objectives.paths import over


class ProjectedGuidance:
    """The differences of the images of one batch, with what momentum remembers of each image.

    Args:
        eta: what is left of the parallel part.
        norm: r, of one image; None is no limit.
        momentum: beta.
    """

    def __init__(self, eta: float, norm: float | None, momentum: float) -> None:
        self.eta, self.norm, self.momentum = eta, norm, momentum
        self._sums: Tensor | None = None

    def __call__(self, conditional: Tensor, base: Tensor, scale: Tensor, images: Tensor, num_images: int) -> Tensor:
        """Guided clean images.

        Args:
            conditional, base: [R, c, ...].
            scale: s, [R].
            images: int64 [R], which of the batch's images the rows are.
            num_images: of the batch.
        """
        difference = conditional - base
        if self.momentum:
            if self._sums is None:
                self._sums = difference.new_zeros(num_images, *difference.shape[1:])
            difference = difference + self.momentum * self._sums[images]
            self._sums[images] = difference
        if self.norm is not None:
            difference = difference * over((self.norm / _norm(difference).clamp(min=1e-12)).clamp(max=1), difference)
        direction = conditional / over(_norm(conditional).clamp(min=1e-12), conditional)
        parallel = over((difference * direction).flatten(1).sum(1), direction) * direction
        return conditional + over(scale - 1, conditional) * (difference - parallel + self.eta * parallel)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
