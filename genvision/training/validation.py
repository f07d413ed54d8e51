"""Loss on held-out samples: the same samples with the same masks, times and noise every time, so that its curve is smooth.

What an objective draws for a sample depends on (seed, position) alone, and here sample j always stands at position j. The model is in
evaluation mode: no dropout, no stochastic depth. Labels are dropped as the objective says: of a LlamaGen none are, since its own embedding
drops them in training only; MaskGIT, MAGE, RAR and DiT drop those of the same samples at every validation, as often as in training.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genvision.data.datasets import TrainingData
from genvision.data.workers import map_in_order
from genvision.errors import UserError

Batch = dict[str, Tensor]


@torch.no_grad()
def validate(loss: Callable[[Batch], dict[str, Tensor]], batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
    """Means of the terms of a loss over all samples of all processes, as `validation_NAME`; the same on every process.

    All processes must call it, with equally many batches of equal sizes: a sharded model works in lockstep. The caller puts the model into
    evaluation mode and gives it the weights that are wanted.

    Args:
        loss: named terms of a batch, each a mean over its samples.
        batches: of this process; each tensor has the samples in its first axis.
    """
    sums: dict[str, Tensor] = {}
    num = 0
    for batch in batches:
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        size = len(next(iter(batch.values())))
        with accelerator.autocast():
            terms = loss(batch)
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=accelerator.device)) + value.float() * size
        num += size
    assert num, "there are no batches to validate with"
    names = sorted(sums)
    means = accelerator.reduce(torch.stack([sums[name] / num for name in names]), "mean").tolist()
    return {f"validation_{name}": mean for name, mean in zip(names, means, strict=True)}


class ValidationBatches:
    """This process's share of some samples, spread evenly over a data set; every iteration gives the same batches.

    Sample j of those chosen stands at position j, on which its noise depends.

    Args:
        dataset: images or codes, held out from training.
        num: samples of all processes; all there are if there are fewer. What does not divide into the processes is left out.
        batch_size: of all processes together.
        num_workers: processes that decode; 0 decodes here.

    Raises:
        UserError: there are fewer samples than processes, or a batch has fewer.
    """

    def __init__(
        self, dataset: TrainingData, *, num: int, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> None:
        wanted = min(num, len(dataset))
        self.num = wanted - wanted % world_size
        if self.num == 0:
            raise UserError(f"train.validate_num {num} of {len(dataset)} samples: each of {world_size} processes needs one; take more")
        if batch_size < world_size:
            raise UserError(f"a batch of {batch_size} cannot be split over {world_size} processes; choose a multiple of {world_size}")
        self.dataset, self.num_workers = dataset, num_workers
        share = np.arange(rank, self.num, world_size)
        self.positions = np.split(share, range(batch_size // world_size, len(share), batch_size // world_size))

    def __iter__(self) -> Iterator[Batch]:
        return map_in_order(self._batch, self.positions, self.num_workers)

    def _batch(self, positions: np.ndarray) -> Batch:
        return self.dataset.get_batch(positions, positions * len(self.dataset) // self.num)
