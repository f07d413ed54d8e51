"""Block caching: most evaluations of a diffusion transformer do not run its blocks, but guess what these would add to the tokens.

What all blocks together add, the residual r, changes little along a trajectory. An evaluation that leaves them out puts r on the line
through its last two computed values over time (the first order of TaylorSeer, arXiv:2503.06923, for the sum of all blocks instead of
each). The patch embedding and the head always run, so the tokens follow x, and the head follows the time.

Which evaluations leave the blocks out depends on their number and on the options alone. Rules that look at hidden states (TeaCache,
arXiv:2411.19108; cache-dit) decide for a batch at once, so that an image would depend on its neighbours. They do so behind a first
block; running it always, or the last one, too, does not lower the error. A DiT of 12 blocks trained on digits, 50 DDIM steps, guidance
4, the blocks run at every third step; distance of latents to those with all blocks, relative L2, mean of 16 images:

    left out                    r as it was last    line    parabola
    all blocks                             0.050   0.035       0.028
    all but the first                      0.051   0.037       0.029
    all but the first and last             0.050   0.035       0.028

The ends of a trajectory are its hard part. With all blocks at the first and last three steps, too, 20 of 50 instead of 18, these are
0.043, 0.0115 and 0.016: hence the line. That is about as good as every second step (26, 0.0097), and 20 plain steps are 0.034 away.
Fresh noise in every step is on no line: the errors of ddpm are several times as large, and those of reusing r as it was no larger.

Shapes: R rows, the branches of an evaluation one after another; N tokens of width C.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENDS = 3
"""Evaluations at either end of a trajectory that run all blocks."""

Call = Callable[[int, Tensor], Tensor]
"""Number of a block and tokens before it -> tokens behind it."""
RunBlocks = Callable[[Call, int, Tensor], Tensor]
"""Call, number of blocks and tokens before the first -> tokens behind the last; DiT takes one."""


def full_evaluations(guided: Sequence[bool], interval: int) -> list[bool]:
    """Which evaluations run all blocks.

    Args:
        guided: whether each evaluation has base rows.
        interval: every how many evaluations all blocks run, at least; 1 is always. The base needs two residuals of its own, so they
            run for two evaluations where guidance begins, too.
    """
    result = list[bool]()
    skipped = known = 0  # evaluations since all blocks ran; residuals of the base since guidance began
    for number, has_base in enumerate(guided):
        known = known if has_base else 0
        at_end = min(number, len(guided) - 1 - number) < ENDS
        result.append(at_end or skipped == interval - 1 or (has_base and known < 2))
        skipped = 0 if result[-1] else skipped + 1
        known += has_base and result[-1]
    return result


class BlockCache:
    """The latest residuals of the images of one batch, for each branch: two tensors of the size of its tokens.

    Args:
        is_full: of each evaluation, from `full_evaluations`.
    """

    def __init__(self, is_full: Sequence[bool]) -> None:
        self._is_full = iter(is_full)
        self._runs_all, self._t = True, 0.0
        self._known: dict[str, list[tuple[float, Tensor]]] = {}

    def begin(self, t: float) -> None:
        """The next evaluation begins, all rows of it at time t."""
        self._runs_all, self._t = next(self._is_full), t

    def run_blocks(self, rows: Mapping[str, int]) -> RunBlocks:
        """What a network takes for its blocks in this evaluation; its rows are those of the branches, in this order."""

        def run(call: Call, num_blocks: int, tokens: Tensor) -> Tensor:
            if not self._runs_all:
                return tokens + torch.cat([self._guess(branch) for branch in rows])
            output = tokens
            for i in range(num_blocks):
                output = call(i, output)
            for branch, residual in zip(rows, (output - tokens).split(list(rows.values())), strict=True):
                earlier = [(t, known) for t, known in self._known.get(branch, []) if t != self._t]  # a corrector is at the same time
                self._known[branch] = [*earlier[-1:], (self._t, residual)]
            return output

        return run

    def _guess(self, branch: str) -> Tensor:
        """[R, N, C] at the present time."""
        (t_before, before), (t, latest) = self._known[branch][0], self._known[branch][-1]
        return latest if t == t_before else before.lerp(latest, (self._t - t_before) / (t - t_before))


@dataclass(frozen=True)
class CacheReport:
    """What block caching saved, and what it changed."""

    left_out: int
    """Block runs of one image, conditional and base rows together."""
    block_runs: int
    """The same without caching."""
    distances: tuple[float, ...]
    """|cached - plain| / |plain| over the latents of each image compared."""

    def __str__(self) -> str:
        mean, largest = sum(self.distances) / len(self.distances), max(self.distances)
        images = "the first image differs" if len(self.distances) == 1 else f"the first {len(self.distances)} images differ"
        spread = f"{mean:.2%}" if len(self.distances) == 1 else f"{mean:.2%} on average, {largest:.2%} at most"
        return (
            f"block caching: {self.left_out:,} of {self.block_runs:,} block runs an image left out; "
            f"{images} from uncached ones by {spread} (relative L2 of latents)"
        )


def relative_distances(latents: Tensor, expected: Tensor) -> tuple[float, ...]:
    """|latents - expected| / |expected| of each image."""
    found, expected = latents.double().flatten(1), expected.double().flatten(1)
    return tuple(((found - expected).norm(dim=1) / expected.norm(dim=1)).tolist())
