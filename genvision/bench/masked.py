"""Row M1: how much of what the machine can do does masked decoding do? Nobody on PyPI does the same, so the floor is the measure.

A job draws 256 tokens of each image with MaskGIT's transformer, by confidence, guidance off, random weights; everything counts that the
sampler does: embeddings, blocks, attention, head, the draws and the choice of tokens. The work is that which the program counts
(`MaskedSampler.multiply_adds`); torch's own counter must agree before anything is timed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genvision.bench.checks import WrongAnswer
from genvision.bench.floors import Floors, Work, counted_flops
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.models.maskgit import MaskGIT
from genvision.samplers.masked import MaskedSampler
from genvision.samplers.randomness import ImageStreams

OWN = "genvision"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the network, the job and the rounds."""

    rounds: int = 9
    images: int = 4
    hidden_dim: int = 768
    depth: int = 12
    num_heads: int = 16
    codebook_size: int = 1024
    grid_size: int = 16
    options: dict[str, Any] = field(default_factory=lambda: {"num_steps": 12})
    """Of the sampler."""


LONG = Sizes()
QUICK = Sizes(rounds=3, images=1, depth=3, options={"num_steps": 4})


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    job = DecodingJob(sizes)
    network = f"MaskGIT {sizes.hidden_dim} x {sizes.depth}"
    what = f"{network}, {sizes.images} image(s) of {job.model.num_tokens} tokens in {sizes.options['num_steps']} steps"
    for row in rows:
        try:
            check = job.check()
        except WrongAnswer as error:
            yield wrong(row, what, str(error))
            continue
        floors = Floors(job.work)
        seconds = by_turns({OWN: job.draw} | floors.calls, sizes.rounds, floors=list(floors.calls))
        notes = (f"{1e-9 * job.work.flops / sizes.images:.0f} GFLOP an image",)
        yield measured(row, what, seconds, own=OWN, floor=floors.floor(seconds, job.work), check=check, notes=notes)


class DecodingJob:
    """A batch of images to draw."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        shape = {"codebook_size": sizes.codebook_size, "grid_size": sizes.grid_size, "hidden_dim": sizes.hidden_dim}
        self.model = MaskGIT(**shape, depth=sizes.depth, num_heads=sizes.num_heads).eval().requires_grad_(False)
        self.sampler = MaskedSampler(**sizes.options)
        self.labels, self.noise = torch.arange(sizes.images), ImageStreams(0, range(sizes.images))
        self.work = Work(2.0 * sizes.images * self.sampler.multiply_adds(self.model))

    def draw(self) -> Tensor:
        return self.sampler.sample(self.model, self.labels, self.noise)

    def check(self) -> str:
        """Every token is settled, and no more work is claimed than is done.

        Raises:
            WrongAnswer: a token is none of the codebook, or the counted work is more than torch's counter finds.
        """
        drawn: list[Tensor] = []
        done = counted_flops(lambda: drawn.append(self.draw()))
        if not ((drawn[0] >= 0) & (drawn[0] < self.model.config.codebook_size)).all():
            raise WrongAnswer("some tokens are none of the codebook")
        if self.work.flops > 1.001 * done:
            raise WrongAnswer(f"{1e-9 * self.work.flops:.1f} GFLOP are claimed, torch counts {1e-9 * done:.1f}")
        return f"all tokens settled; claimed work {self.work.flops / done:.3f} of torch's count"
