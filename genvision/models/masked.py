"""What every generator of masked tokens answers to: it reads all tokens of an image at once, known and unknown, and predicts them.

Shapes: B rows, N tokens of an image, K codebook entries, Q positions that are read anew, M positions that are predicted.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.layers.nested import TokenCache
from genvision.layers.token_loss import TokenLosses, TokenTargets
from genvision.models.base import Generator


class MaskedGenerator(Generator):
    """Codes are 0 .. K - 1, and K (`mask_id`) where a token is unknown, whatever number a checkpoint has for it."""

    codebook_size: int
    num_tokens: int
    num_heads: int
    hidden_units: int
    """F of every feed-forward block; with the heads it decides which nested networks there are."""

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @abstractmethod
    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        drop: Tensor | None = None,
        where: Tensor | None = None,
        nesting: int = 1,
        cache: TokenCache | None = None,
        fresh: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor | TokenLosses:
        """Logits of tokens.

        Args:
            codes: int64 [B, N], or [B, h, w]; `mask_id` where unknown.
            labels: int64 [B].
            drop: boolean [B], whose label is replaced by the null one; None draws it in training and drops none in eval.
            where: int64 [B, M], the tokens that are predicted; None is all of them.
            nesting: p, only the first 1 / p of heads and hidden units take part.
            cache: keys and values of all positions. A pass without `fresh` fills it; one with `fresh` reads these tokens alone, besides
                the condition, and everything else from the cache.
            fresh: int64 [B, Q], the tokens that are read, in ascending order; `where` must be among them.
            targets: of the M predictions.

        Returns:
            float32 [B, M, K]; with targets, what these predictions cost.
        """

    @abstractmethod
    def multiply_adds(self, num_read: int, num_predicted: int, nesting: int = 1) -> int:
        """Of one row: `num_read` of the N tokens and the condition go through the blocks, `num_predicted` through the head."""

    def check_nesting(self, nesting: int) -> None:
        """Raises UserError where there is no such nested network."""
        if nesting < 1 or self.num_heads % nesting or self.hidden_units % nesting:
            raise UserError(
                f"nesting {nesting} is not possible; it must divide the {self.num_heads} heads and the {self.hidden_units} hidden units"
            )


def positions_within(fresh: Tensor, where: Tensor) -> Tensor:
    """Where each of `where` int64 [B, M] stands in `fresh` int64 [B, Q], whose rows ascend: int64 [B, M]."""
    return torch.searchsorted(fresh.contiguous(), where.contiguous())
