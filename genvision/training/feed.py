"""The batches of a process, one step ahead of the training."""

from collections.abc import Generator

import torch
from accelerate import Accelerator

from genvision.errors import UserError
from genvision.training.phases import Phases
from genvision.training.stage import Batch, Stream


class Feed:
    """The batches of this process, one at a time; a failure to read one waits until all processes know of it.

    Args:
        start_step: of the first batch, in steps of data.

    Raises:
        UserError: some process cannot read its first batch.
    """

    def __init__(self, stream: Stream, start_step: int, accelerator: Accelerator, phases: Phases) -> None:
        self.phases = phases
        self.error: UserError | None = None
        self.batch: Batch = {}
        self._batches = iter(stream(start_step, accelerator.process_index, accelerator.num_processes))
        self.advance()
        phases.enter("agreement")
        failed = torch.tensor(float(self.error is not None), device=accelerator.device)
        if bool(accelerator.reduce(failed, "sum") > 0):
            raise self.error or UserError("another process could not read its data; its message says why")

    def close(self) -> None:
        """Let go of what reads ahead."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def advance(self) -> None:
        """Put the next one into `batch`, or into `error` what went wrong."""
        self.phases.enter("data")
        try:
            self.batch = next(self._batches)
        except UserError as error:
            self.error = error
