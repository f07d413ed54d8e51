"""Vector quantisation with nearest codes, and what is known about how the codes are used.

Shapes: z [B, h, w, D] vectors, K codes, codes [B, h, w] int64.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEARCH_ROWS = 8192
"""Vectors compared with the codebook at once outside training; bounds memory at 8192 x K floats."""


@dataclass(frozen=True)
class Quantized:
    """Result of one quantisation in training."""

    quantized: Tensor
    """[B, h, w, D], straight-through: gradients reach z unchanged."""
    codes: Tensor
    """[B, h, w] int64."""
    losses: dict[str, Tensor]
    """`codebook`, `commitment`, `entropy`, each already weighted."""


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with unit vectors (LlamaGen, arXiv:2406.06525 section 3.1; van den Oord 2017 for the losses).

    Args:
        codebook_size: K.
        codebook_dim: D.
        l2_norm: compare and return unit vectors; the stored table itself is not kept at unit length.
        commitment_beta: weight of the commitment term, which moves the encoder.
        codebook_weight: weight of the codebook term, which moves the codes.
        entropy_weight: weight of mean per-vector entropy minus entropy of the mean assignment (0 leaves it out).
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        l2_norm: bool,
        commitment_beta: float,
        codebook_weight: float = 1.0,
        entropy_weight: float,
    ) -> None:
        super().__init__()
        self.l2_norm, self.entropy_weight = l2_norm, entropy_weight
        self.commitment_beta, self.codebook_weight = commitment_beta, codebook_weight
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        if l2_norm:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def table(self) -> Tensor:
        """The codes as used, [K, D]."""
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def look_up(self, codes: Tensor) -> Tensor:
        """Vectors of the given codes: [...] int64 -> [..., D]."""
        vectors = F.embedding(codes, self.embedding.weight)
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code: [..., D] -> [...] int64; the first of equals."""
        with torch.autocast(z.device.type, enabled=False):
            flat, table = self._normalized(z.float()).flatten(0, -2), self.table().float()
            parts = [_squared_distances(rows, table).argmin(1) for rows in flat.split(SEARCH_ROWS)]
        return torch.cat(parts).view(z.shape[:-1])

    def forward(self, z: Tensor) -> Quantized:
        """Quantise [B, h, w, D] with a straight-through gradient and the training losses (means over all elements)."""
        with torch.autocast(z.device.type, enabled=False):
            z, table = self._normalized(z.float()), self.table().float()
            distances = _squared_distances(z.flatten(0, -2), table)  # [BN, K]
            codes = distances.detach().argmin(1).view(z.shape[:-1])
            vectors = F.embedding(codes, table)
            losses = {
                "codebook": self.codebook_weight * F.mse_loss(vectors, z.detach()),
                "commitment": self.commitment_beta * F.mse_loss(z, vectors.detach()),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * assignment_entropy_gap(distances)
        return Quantized(z + (vectors - z).detach(), codes, losses)

    def _normalized(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.l2_norm else z


def _squared_distances(z: Tensor, table: Tensor) -> Tensor:
    # written as |z|^2 + |e|^2 - 2 z.e, as the official code does, so that near ties fall the same way
    return z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.t()


def assignment_entropy_gap(distances: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of soft assignments minus entropy of their mean: low when each choice is sure and all codes are used.

    Args:
        distances: [N, K] squared distances.
        temperature: of the softmax over minus distances.
    """
    log_p = F.log_softmax(-distances / temperature, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(0)
    per_vector = -(p * log_p).sum(-1).mean()
    of_mean = -(mean_p * (mean_p + 1e-5).log()).sum()
    return per_vector - of_mean


class CodebookUsage:
    """Counts codes over a whole pass; usage, perplexity and entropy come from the sums, never from one batch."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        self.counts += torch.bincount(codes.detach().flatten().cpu(), minlength=len(self.counts))

    def sum_over_processes(self) -> "CodebookUsage":
        """Counts of all processes together, on every process; every process must call it."""
        from accelerate.utils import reduce

        from genvision.processes import process_state

        total = CodebookUsage(len(self.counts))
        total.counts = reduce(self.counts.to(process_state().device), reduction="sum").cpu()
        return total

    def summary(self) -> dict[str, float]:
        """`usage` in [0, 1], `perplexity` in [1, K] and `entropy_bits` in [0, log2 K]."""
        total = int(self.counts.sum())
        if total == 0:
            return {"usage": 0.0, "perplexity": 0.0, "entropy_bits": 0.0}
        p = self.counts.double() / total
        entropy = float(torch.special.entr(p).sum())
        return {
            "usage": float((self.counts > 0).double().mean()),
            "perplexity": math.exp(entropy),
            "entropy_bits": entropy / math.log(2),
        }

    @property
    def num_dead(self) -> int:
        """Codes that never occurred."""
        return int((self.counts == 0).sum())

    def top_share(self, part: float = 0.01) -> float:
        """How much of everything the most frequent codes make up, in [0, 1].

        Args:
            part: of the codebook, at least one code; a codebook in even use gives `part` again.
        """
        num = max(1, round(part * len(self.counts)))
        return int(self.counts.topk(num).values.sum()) / max(1, int(self.counts.sum()))


@torch.no_grad()
def revive_dead_codes(quantizer: VectorQuantizer, counts: Tensor, z: Tensor, generator: torch.Generator) -> int:
    """Move every code that was not used onto an encoder output of the present batch (after Jukebox, arXiv:2005.00341 section 3.1).

    Args:
        quantizer: changed in place.
        counts: [K], how often each code was used lately.
        z: [..., D] encoder outputs to choose from, with replacement.
        generator: source of the choice, on the CPU.

    Returns:
        How many codes were moved.
    """
    dead = (counts == 0).nonzero().flatten()
    if len(dead) == 0:
        return 0
    flat = quantizer._normalized(z.detach().float()).flatten(0, -2)
    chosen = torch.randint(len(flat), (len(dead),), generator=generator)
    weight = quantizer.embedding.weight
    weight[dead.to(weight.device)] = flat[chosen.to(flat.device)].to(weight)
    return len(dead)
