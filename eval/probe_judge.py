"""The probes of one kind of features with what they get right, and what must be said of the figures.

Shapes: N training images, M test images, D features.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genvision.eval.accuracy import wilson_interval
from genvision.eval.probe_config import ProbeConfig
from genvision.eval.probe_heads import classify_by_neighbours, fit_linear_probe
from genvision.eval.probe_mage import MageProbe, MageRecipe
from genvision.progress import Progress

FEW_HELD_OUT = 100
"""Below so many the choice among layers and probes is coarse."""
SMALL_REACH, GOOD_REACH = 2000, 5000
"""Of MAGE's recipe: rows seen times the learning rate over 256. LARS moves weights by about a thousandth of their length for each, so what
counts is this product alone; 90 epochs of ImageNet have 45,000, and 898 digits need some 3,000."""


@dataclass(frozen=True)
class Judge:
    """The probes of features, tested."""

    labels: Tensor
    test_labels: Tensor
    held_out: Tensor
    num_classes: int
    config: ProbeConfig
    device: str
    show_progress: bool

    def __call__(self, train: Tensor, test: Tensor) -> list[dict[str, Any]]:
        """A row for each probe of features [N, D]."""
        train, test, labels, held_out = (tensor.to(self.device) for tensor in (train, test, self.labels, self.held_out))
        rows = []
        if "knn" in self.config.probes:
            options = {"k": self.config.k, "temperature": self.config.temperature}
            chosen = classify_by_neighbours(train[~held_out], labels[~held_out], train[held_out], self.num_classes, **options)  # type: ignore[arg-type]
            guessed = classify_by_neighbours(train, labels, test, self.num_classes, **options)  # type: ignore[arg-type]
            rows.append(self.row("knn", guessed, share_of(chosen == labels[held_out])))
        if "linear" in self.config.probes:
            linear, weight_decay, share = fit_linear_probe(train, labels, self.num_classes, held_out, self.config.weight_decays)
            rows.append(self.row("linear", linear(test), share, weight_decay=weight_decay))
        if "mage" in self.config.probes:
            choosing = self._mage(train[~held_out], labels[~held_out])
            share = share_of(choosing(train[held_out]) == labels[held_out])
            whole = self._mage(train, labels)
            rows.append(self.row("mage", whole(test), share, training_loss=whole.loss))
        return rows

    def row(
        self, name: str, guessed: Tensor, held_out: float, *, weight_decay: float | None = None, training_loss: float | None = None
    ) -> dict[str, Any]:
        """A row for guesses of the test images, int64 [M]."""
        right, total = int((guessed.cpu() == self.test_labels).sum()), len(guessed)
        scores = {"top1": right / total, "interval": wilson_interval(right, total), "held_out": held_out}
        return {"probe": name, **scores, "weight_decay": weight_decay, "training_loss": training_loss}

    def _mage(self, features: Tensor, labels: Tensor) -> MageProbe:
        config = self.config
        recipe = MageRecipe(
            epochs=config.mage_epochs, batch_size=config.mage_batch_size, learning_rate=config.mage_learning_rate, seed=config.seed
        )
        progress = Progress(recipe.num_rows(len(features)), "training MAGE's linear probe", show=self.show_progress, unit="rows")
        probe = MageProbe(features, labels, self.num_classes, recipe, advance=progress.advance)
        progress.close()
        return probe


def share_of(right: Tensor) -> float:
    """Of what is true in bool [N]."""
    return int(right.sum()) / len(right)


def remarks(config: ProbeConfig, num_labels: int, num_train: int, num_held_out: int, *, has_choice: bool) -> tuple[list[str], list[str]]:
    """Notes and warnings on few labels and on MAGE's recipe."""
    notes, warnings = [], []
    if num_labels < num_train:
        notes.append(
            f"few-shot: the labels of {num_labels:,} of {num_train:,} training images were used; intervals are those of the test images "
            "alone, another draw of labels (--seed) moves the figure further"
        )
    if has_choice and num_held_out < FEW_HELD_OUT:
        notes.append(f"{num_held_out:,} images chose layer and probe, which is coarse; for a fixed protocol give one --layer and --probe")
    if "mage" in config.probes:
        notes.append("mage: trained on features of one centre crop an image; the published protocol draws new crops every epoch")
        reach = config.mage_epochs * num_labels * config.mage_learning_rate / 256
        if reach < SMALL_REACH:
            enough = config.mage_learning_rate * GOOD_REACH / reach
            warnings.append(
                f"mage: {config.mage_epochs} epochs of {num_labels:,} images at rate {config.mage_learning_rate:g} hardly move the weights "
                f"(the recipe is ImageNet's); raise --mage-lr to about {enough:.2g}"
            )
    return notes, warnings
