"""The random numbers of a batch of masked images: which token, which of them are kept, and in which order.

Shapes: B images, N tokens, M of them masked, K codebook entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genvision.kernels.draw import draw
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose


class TokenDraws:
    """What is random in a batch: image i uses the streams of `noise.indices[i]` alone."""

    def __init__(self, noise: ImageStreams, num_tokens: int, device: torch.device) -> None:
        self.noise, self.num_tokens, self.device = noise, num_tokens, device

    def ids(self, step: int, logits: Tensor, where: Tensor) -> Tensor:
        """A token for each of the positions `where` int64 [B, M] from logits [B, M, K]: int64 [B, M]."""
        uniform = self.noise.uniform(Purpose.TOKEN, self.num_tokens, step=step).to(self.device).gather(1, where)
        return draw(F.softmax(logits.flatten(0, 1), dim=-1), uniform.flatten()).view(where.shape)

    def gumbel(self, step: int) -> Tensor:
        """Noise of the confidences, float32 [B, N]."""
        uniform = self.noise.uniform(Purpose.CHOICE, self.num_tokens, step=step).clamp(1e-20, 1 - 2.0**-53)
        return -torch.log(-torch.log(uniform)).float().to(self.device)

    def order(self) -> Tensor:
        """Random orders of the tokens, int64 [B, N]."""
        return self.noise.uniform(Purpose.CHOICE, self.num_tokens).argsort(dim=1).to(self.device)

    def shift(self) -> Tensor:
        """How far a fixed order is rolled, int64 [B]."""
        return (self.noise.uniform(Purpose.ORDER_SHIFT, 1)[:, 0] * self.num_tokens).long().to(self.device)
