"""How a classifier is fine-tuned, and its learning rate as a pure function of progress."""

from dataclasses import dataclass
from typing import Literal, get_args

from genvision.data.transforms import Crop
from genvision.errors import UserError
from genvision.eval.probe_mage import cosine_with_warmup


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a classifier is fine-tuned; the defaults are MAGE's for ViT-B but for its RandAugment, which is left out."""

    layer: int | None = None
    """Whose outputs are classified, 0 to the number of blocks; None takes the last."""
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 2.5e-4
    """Peak for 256 images a batch, of the head; scaled with the batch size."""
    min_learning_rate: float = 1e-6
    """What it falls to along a cosine."""
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    """Of tensors of two or more dimensions."""
    layer_decay: float = 0.65
    """Factor of the learning rate from each layer to the one below."""
    drop_path: float = 0.1
    """Probability with which the last block is left out for an image; rises from 0 in a line."""
    mixup: float = 0.8
    """Of the Beta distribution of the shares; 0 turns it off."""
    cutmix: float = 1.0
    """Likewise."""
    label_smoothing: float = 0.1
    crop: Crop = "resized"
    """resized: between a fifth and the whole of an image; random: from an image enlarged by up to a quarter; center: ADM's."""
    flip: bool = True
    """Mirror half of the images; not for digits and letters."""
    test_every: int = 1
    """Epochs between tests; one is made at the end in any case."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products; bfloat16 is for GPUs."""
    seed: int = 0
    """Of the head's weights, the order, crops, mirroring, mixing, and what is left out."""

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise UserError(f"crop '{self.crop}' is unknown; choose one of {', '.join(get_args(Crop))}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("test_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("warmup_epochs", "weight_decay", "mixup", "cutmix", "min_learning_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.min_learning_rate > self.peak:
            raise UserError(
                f"min_learning_rate {self.min_learning_rate:g} lies above the peak {self.peak:g} (learning_rate times batch_size / 256); "
                "lower it"
            )
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs {self.warmup_epochs:g} must be fewer than the {self.epochs} epochs; lower it")
        for name in ("drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number of at least 0, got {self.seed}")

    @property
    def peak(self) -> float:
        """The learning rate of the head after the warm-up."""
        return self.learning_rate * self.batch_size / 256

    def rate(self, progress: float) -> float:
        """That of the head after a part of the steps, in [0, 1)."""
        warmup = self.warmup_epochs / self.epochs
        lowest = self.min_learning_rate if progress >= warmup else 0.0
        return lowest + (self.peak - lowest) * cosine_with_warmup(progress, warmup)
