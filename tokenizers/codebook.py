"""How codes are used: counts over a whole pass, dead codes brought back to life, and indices among the used codes alone.

Shapes: codes [...] int64, K codes, z [..., D] encoder outputs.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.tokenizers.quantized import Quantizer


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
def revive_dead_codes(quantizer: Quantizer, counts: Tensor, z: Tensor, generator: torch.Generator, *, threshold: int = 1) -> int:
    """Move every code that was hardly used onto an encoder output of the present batch (after Jukebox, arXiv:2005.00341 section 3.1).

    With several processes every one must call it, with equal counts; each gives outputs of its own for some codes, and all end equal.

    Args:
        quantizer: changed in place, moving averages included.
        counts: [K], how often each code was used lately, by all processes.
        z: [..., D] encoder outputs to choose from, with replacement.
        generator: source of the choice, on the CPU.
        threshold: codes used less often than this are dead.

    Returns:
        How many codes were moved.

    Raises:
        UserError: the codes of this quantiser cannot be moved one by one.
    """
    dead = (counts < threshold).nonzero().flatten()
    if len(dead) == 0:
        return 0
    flat = z.detach().float().flatten(0, -2)
    chosen = torch.randint(len(flat), (len(dead),), generator=generator)
    vectors = flat[chosen.to(flat.device)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        owner = torch.arange(len(dead), device=vectors.device) % torch.distributed.get_world_size()
        vectors[owner != torch.distributed.get_rank()] = 0
        torch.distributed.all_reduce(vectors)
    quantizer.move(dead, vectors)
    return len(dead)


class Remap:
    """Indices among the codes in use, for data that holds few of them (taming's `remap`): code `used[i]` <-> index i.

    Args:
        used: [n] int64, distinct codes.
        codebook_size: K.
        unknown: what a code outside `used` becomes: a `random` index, an `extra` index n (which comes back as `used[0]`), or this index.

    Attributes:
        num_indices: n, or n + 1 with `extra`.
    """

    def __init__(self, used: Tensor, codebook_size: int, *, unknown: Literal["random", "extra"] | int = "random") -> None:
        if used.dim() != 1 or not len(used) or used.min() < 0 or used.max() >= codebook_size or len(used.unique()) != len(used):
            raise UserError(
                f"remap: a list of distinct codes 0 .. {codebook_size - 1} is expected, got a tensor of shape {list(used.shape)}"
            )
        if unknown not in ("random", "extra") and not (isinstance(unknown, int) and 0 <= unknown < len(used)):
            raise UserError(f"remap: unknown '{unknown}' must be random, extra or an index 0 .. {len(used) - 1}")
        self.used, self.unknown = used, unknown
        self.num_indices = len(used) + (unknown == "extra")
        self._index_of = torch.full((codebook_size,), -1)
        self._index_of[used] = torch.arange(len(used))

    def to_used(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes [...] -> indices [...] in 0 .. num_indices - 1; `random` draws from `generator`, on the CPU."""
        indices = self._index_of.to(codes.device)[codes]
        if self.unknown == "random":
            if generator is None:
                raise ValueError("unknown codes become random indices: give a generator")
            other = torch.randint(len(self.used), codes.shape, generator=generator).to(codes.device)
        else:
            other = torch.full_like(indices, len(self.used) if self.unknown == "extra" else int(self.unknown))
        return torch.where(indices < 0, other, indices)

    def to_all(self, indices: Tensor) -> Tensor:
        """Indices [...] -> codes [...]."""
        return self.used.to(indices.device)[torch.where(indices < len(self.used), indices, 0)]
