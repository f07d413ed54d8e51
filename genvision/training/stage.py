"""What the training loop asks of a stage, and of those who look at a run from outside."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from genvision.training.config import OptimConfig
from genvision.training.ema import EMA

Batch = dict[str, Tensor]


class Stage(Protocol):
    """What differs between training a tokenizer and training a generator."""

    @property
    def model(self) -> nn.Module: ...

    baselines: dict[str, float]
    """Values to read terms against: the `loss` of guessing, say."""
    needs_average: bool
    """Whether `before_step` must be given averages that can be called."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named terms; `loss` is what is minimised. `model` is the wrapped form of `self.model`."""

    def held_out_loss(self, model: nn.Module, batch: Batch, averages: EMA) -> dict[str, Tensor]:
        """The terms of a batch that is not trained on; a later step's loss does not depend on it."""

    @property
    def adversary(self) -> "Adversary | None":
        """A second network with an optimiser of its own, trained on the same batches right behind the model; None where there is none."""

    def before_step(self, step: int, averages: EMA) -> None:
        """Called when `step` steps are done, before the next one's batch; `averages` calls the model with its averaged weights."""

    def after_step(self, step: int, accelerator: Accelerator, averaged: "AveragedModel") -> dict[str, float]:
        """Called when `step` steps are done, before averages are taken; returns values to log."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beyond model and optimiser: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


AveragedModel = Callable[[], AbstractContextManager[nn.Module]]
"""Opens the model with averaged weights, whole and in eval mode; for all processes at once."""


class Adversary(Protocol):
    """A network that is trained against the model: a discriminator."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def optim(self) -> OptimConfig: ...

    @property
    def statistics(self) -> Sequence[nn.Module]:
        """Modules beside the network that keep running statistics."""

    def loss(self, batch: Batch) -> dict[str, Tensor] | None:
        """Named terms, `adversary_loss` is what is minimised, of the batch that the stage's `loss` has just seen; None: not trained now."""


class Stream(Protocol):
    """Batches of this process from a step on."""

    def __call__(self, start_step: int, rank: int, world_size: int) -> Iterable[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Observers:
    """What looks at a run from outside. Models that are handed out are whole, hold averaged weights, and are in eval mode."""

    preview: Callable[[int, nn.Module], None] | None = None
    """Called in the main process every `preview_every` steps."""
    held_out: Callable[[int, int], Iterable[Batch]] | None = None
    """rank and number of processes -> batches for the validation loss every `validate_every` steps, as many in each process."""
    scores: Callable[[nn.Module], dict[str, float]] | None = None
    """Called in all processes every `scores.every` steps; `fid` is logged as `online_fid`."""
    flops_per_sample: float | None = None
    """Of forward and backward pass, for the utilisation of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is made of beside its configuration; a checkpoint holds it."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    """`data`, `tokenizer`, ... to a hash."""
    may_change: frozenset[str] = frozenset()
    """Names among them that may differ from the checkpoint's."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options that were changed since the run was last started, to their old and new values."""
    accepted: Callable[[], None] | None = None
    """Called in the main process when nothing stands against these changes."""
