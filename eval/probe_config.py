"""What is probed, and how."""

from dataclasses import dataclass
from typing import Literal, get_args

from genvision.errors import UserError

Pooling = Literal["mean", "class", "attentive"]
ProbeName = Literal["knn", "linear", "mage"]
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is probed, and how."""

    layers: tuple[int, ...] | None = None
    """0 is what the first block reads, i what the i-th gives; None takes all."""
    poolings: tuple[Pooling, ...] = ("mean",)
    """mean: over the positions of the image; class: the position of the condition; attentive: a learned query, trained with the probe."""
    probes: tuple[ProbeName, ...] = ("knn", "linear")
    """What classifies pooled features: knn, linear (fitted to its optimum), mage (a linear layer trained as MAGE reports it)."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of their votes."""
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS
    """Of the linear probe, to choose from."""
    attentive_epochs: int = 30
    """Passes over the training images for attentive pooling."""
    mage_epochs: int = 90
    """Passes over the training images of the probe `mage`."""
    mage_batch_size: int = 4096
    """Its batches, at most; all training images where there are fewer."""
    mage_learning_rate: float = 0.1
    """Its peak for 256 images a batch, scaled with the batch size."""
    label_fraction: float | None = None
    """Part of the training images of each class whose labels are used, at least one; the others are not read."""
    labels_per_class: int | None = None
    """So many labels of each class instead."""
    batch_size: int = 64
    seed: int = 0
    """Of the images that are held out, of subsets, of the labels that are used, of attentive pooling and of the probe `mage`."""

    def __post_init__(self) -> None:
        if not self.poolings or set(self.poolings) - set(get_args(Pooling)):
            raise UserError(f"pooling '{', '.join(self.poolings)}' is unknown; choose from {', '.join(get_args(Pooling))}")
        if not self.probes or set(self.probes) - set(get_args(ProbeName)):
            raise UserError(f"probe '{', '.join(self.probes)}' is unknown; choose from {', '.join(get_args(ProbeName))}")
        for name in ("k", "attentive_epochs", "batch_size", "mage_epochs", "mage_batch_size", "labels_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.mage_batch_size < 2:
            raise UserError("mage_batch_size must be at least 2, got 1; its BatchNorm needs several rows")
        if not 0 < self.mage_learning_rate < float("inf"):
            raise UserError(f"mage_learning_rate must be above 0, got {self.mage_learning_rate}")
        if self.label_fraction is not None and not 0 < self.label_fraction <= 1:
            raise UserError(f"label_fraction must be above 0 and at most 1, got {self.label_fraction}")
        if self.label_fraction is not None and self.labels_per_class is not None:
            raise UserError(
                f"label_fraction {self.label_fraction} and labels_per_class {self.labels_per_class} were both given; choose one of them"
            )
        if self.temperature <= 0 or min(self.weight_decays, default=-1) < 0:
            raise UserError(f"temperature must be above 0 and weight decays at least 0, got {self.temperature} and {self.weight_decays}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number of at least 0, got {self.seed}")
