"""Fine-tuning a generator as an image classifier (MAGE, arXiv:2211.09117, section 4.3): what its trunk is worth as a start.

Images are cropped, mirrored and mixed, the frozen tokenizer makes codes, and the generator's blocks up to a layer learn with a new head.
The learning rate falls by a factor from layer to layer towards the input (arXiv:2003.10555, 2106.08254), whole blocks are left out at
random, and the last weights are tested; test images choose nothing.

Shapes: N images, B images of a batch, K classes.
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genvision.data.datasets import ImageDataset, batches, ordered_batches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.accuracy import INTERVAL_METHOD, match_classes, wilson_interval
from genvision.eval.features import exact_float32
from genvision.eval.finetune_config import FinetuneConfig
from genvision.eval.job import software_versions
from genvision.eval.mixing import mixer
from genvision.eval.trunk_classifier import TrunkClassifier
from genvision.images import from_uint8
from genvision.layers.drop_path import stochastic_depth
from genvision.progress import Progress
from genvision.training.rng import seeded

SCHEMA = "genvision.finetune/1"
BETAS = (0.9, 0.999)
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """Accuracy of the last weights, and what it depends on."""

    schema: str = SCHEMA

    top1: float
    top1_interval: Interval
    interval_method: str = INTERVAL_METHOD
    chance: float
    """Share of the commonest class among the test images."""
    curve: list[dict[str, Any]]
    """A row for each test: epoch, step, loss (mean of the training loss since the last row) and top1."""

    model: str | None = None
    generator_hash: str | None = None
    tokenizer_hash: str | None = None
    """Before training; the tokenizer does not change."""
    layer: int
    num_layers: int
    num_parameters: int
    """That were trained."""
    train: str
    train_hash: str
    test: str
    test_hash: str
    num_train: int
    num_test: int
    num_classes: int
    image_size: int
    crop: str
    """Of the test images."""

    epochs: int
    num_steps: int
    batch_size: int
    learning_rate: float
    """Peak of the head, as it was used."""
    min_learning_rate: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    mixup: float
    cutmix: float
    label_smoothing: float
    training_crop: str
    flip: bool
    dtype: str
    seed: int

    device: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def finetune(
    generator: Any,
    tokenizer: Any,
    train: ImageSource,
    test: ImageSource,
    *,
    config: FinetuneConfig | None = None,
    model: str | None = None,
    hashes: Mapping[str, str] | None = None,
    num_workers: int = 0,
    device: str = "cpu",
    show_progress: bool = False,
) -> tuple[TrunkClassifier, FinetuneResult]:
    """Fine-tune `generator` itself, whose weights change, and test it.

    Args:
        generator: a `genvision.models.base.Generator` with `blocks`.
        tokenizer: makes its codes.
        model: its name for the result.
        hashes: `generator` and `tokenizer` to their hashes, for the result.

    Returns:
        The classifier in eval mode, which knows the classes as `test` numbers them, and the result.

    Raises:
        UserError: the layer is not there, the model has no null label, the classes do not match, or the loss is not finite.
    """
    began = time.monotonic()
    config = config or FinetuneConfig()
    translation, matching = match_classes(train.label_names, test.label_names, "the training set", "the test set")
    warnings = [matching] if matching else []
    size = generator.image_size(tokenizer.spec.downsample, tokenizer.spec.image_size)
    num_layers = len(generator.blocks)
    layer = num_layers if config.layer is None else config.layer
    with seeded(config.seed):
        classifier = TrunkClassifier(generator.to(device), tokenizer.to(device), layer=layer, num_classes=test.num_classes)
    train_hash, test_hash = train.content_hash(), test.content_hash()
    if train_hash == test_hash:
        warnings.append("the classifier is tested on the images that it is trained on: this is no accuracy")
    tuning = _Tuning(
        classifier=classifier, config=config, image_size=size, num_workers=num_workers, device=device, show_progress=show_progress
    )
    curve, right = tuning.run(train, translation, test)
    parameters = dict(classifier.named_parameters())
    notes = [f"the weights of the last of {config.epochs} epochs are tested; test images choose nothing"]
    return classifier.eval(), FinetuneResult(
        top1=right / len(test),
        top1_interval=wilson_interval(right, len(test)),
        chance=float(np.bincount(test.labels).max() / len(test)),
        curve=curve,
        model=model,
        generator_hash=(hashes or {}).get("generator"),
        tokenizer_hash=(hashes or {}).get("tokenizer"),
        layer=layer,
        num_layers=num_layers,
        num_parameters=sum(parameters[name].numel() for name in classifier.trained),
        train=train.spec,
        train_hash=train_hash,
        test=test.spec,
        test_hash=test_hash,
        num_train=len(train),
        num_test=len(test),
        num_classes=test.num_classes,
        image_size=size,
        crop=f"ADM centre crop to {size}",
        epochs=config.epochs,
        num_steps=config.epochs * tuning.steps_per_epoch(len(train)),
        batch_size=config.batch_size,
        learning_rate=config.peak,
        min_learning_rate=config.min_learning_rate,
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        drop_path=config.drop_path,
        mixup=config.mixup,
        cutmix=config.cutmix,
        label_smoothing=config.label_smoothing,
        training_crop=config.crop,
        flip=config.flip,
        dtype=config.dtype,
        seed=config.seed,
        device=device,
        seconds=round(time.monotonic() - began, 2),
        versions=software_versions(),
        notes=notes,
        warnings=warnings,
    )


@dataclass(frozen=True, kw_only=True)
class _Tuning:
    classifier: TrunkClassifier
    config: FinetuneConfig
    image_size: int
    num_workers: int
    device: str
    show_progress: bool

    def steps_per_epoch(self, num: int) -> int:
        return math.ceil(num / self.config.batch_size)

    def run(self, train: ImageSource, translation: np.ndarray, test: ImageSource) -> tuple[list[dict[str, Any]], int]:
        """The curve, and how many test images the last weights get right."""
        config, network = self.config, self.classifier
        dataset = ImageDataset(train, self.image_size, crop=config.crop, flip=config.flip, seed=config.seed)
        dataset.labels = translation[train.labels]
        epoch_steps = self.steps_per_epoch(len(train))
        num_steps = config.epochs * epoch_steps
        stream = batches(dataset, seed=config.seed, batch_size=config.batch_size, num_workers=self.num_workers, end_step=num_steps)
        optimizer = torch.optim.AdamW(parameter_groups(network, config), lr=config.peak, betas=BETAS)
        mix = mixer(config.mixup, config.cutmix, network.head.out_features)
        progress = Progress(num_steps * config.batch_size, "fine-tuning", show=self.show_progress)
        curve: list[dict[str, Any]] = []
        losses: list[float] = []
        right = 0
        with ExitStack() as stack:
            stack.enter_context(exact_float32())
            stack.enter_context(seeded(config.seed))
            stack.enter_context(stochastic_depth(network.generator.blocks[: network.layer], config.drop_path))
            network.train()
            for step, batch in enumerate(stream):
                rate = config.rate(step / num_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                torch.manual_seed(_step_seed(config.seed, step))
                images, shares = mix(batch["images"].to(self.device), batch["labels"].to(self.device))
                with self._autocast():
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), shares, label_smoothing=config.label_smoothing)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise UserError(f"fine-tuning: the loss is {losses[-1]} at step {step}; lower --lr ({config.learning_rate:g})")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                progress.advance(config.batch_size, note=f"loss {losses[-1]:.3f}")
                epoch = (step + 1) // epoch_steps
                if step + 1 == num_steps or ((step + 1) % epoch_steps == 0 and epoch % config.test_every == 0):
                    right = self._test(test)
                    row = {"epoch": epoch, "step": step + 1, "loss": float(np.mean(losses)), "top1": right / len(test)}
                    curve.append(row)
                    losses = []
        progress.close()
        return curve, right

    def _test(self, test: ImageSource) -> int:
        """How many test images are named rightly; leaves the network in training mode."""
        network, right = self.classifier.eval(), 0
        loader = ordered_batches(test, self.image_size, batch_size=self.config.batch_size, num_workers=self.num_workers)
        with torch.no_grad():
            for batch in loader:
                with self._autocast():
                    logits = network(from_uint8(batch["images"]).to(self.device))
                right += int((logits.argmax(dim=1).cpu().numpy() == batch["labels"]).sum())
        network.train()
        return right

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.config.dtype == "bfloat16")


def parameter_groups(classifier: TrunkClassifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Trained parameters by depth and by whether they are decayed; `scale` is what their learning rate is multiplied by."""
    parameters = dict(classifier.named_parameters())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name in classifier.trained:
        depth, decays = classifier.depth_of(name), parameters[name].dim() > 1
        scale = config.layer_decay ** (classifier.layer + 1 - depth)
        new = {"params": [], "scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
        groups.setdefault((depth, decays), new)["params"].append(parameters[name])
    return list(groups.values())


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) % 2**63
