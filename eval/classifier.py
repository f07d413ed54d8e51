"""A ResNet that learns to name images, from random weights and a seed: the judge of the Classification Accuracy Score.

Shapes: N images, B images of a batch, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.data.datasets import ImageDataset, batches, ordered_batches
from genvision.data.sources import ImageSource
from genvision.errors import UserError
from genvision.eval.features import exact_float32
from genvision.images import from_uint8
from genvision.progress import Progress

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet20"]
SMALL_SIDE = 64
"""Up to this side the first layer is a 3x3 convolution without stride and pooling, or little would be left of an image."""
MOMENTUM = 0.9
WARMUP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the classifier is trained; the same for generated and for real images."""

    architecture: Architecture = "resnet18"
    """A ResNet of torchvision, from random weights; or resnet20, the narrow one for small images, which trains many times faster."""
    num_epochs: int = 90
    """Passes over the training images; of no account if `num_steps` is given."""
    num_steps: int | None = None
    """Batches; the real-trained baseline always takes as many as the generated one."""
    batch_size: int = 128
    learning_rate: float = 0.1
    """Peak for 256 images a batch, scaled with the batch size; rises over the first twentieth, then falls along a cosine to 0."""
    weight_decay: float = 1e-4
    """Of all weights of convolutions and of the last layer."""
    label_smoothing: float = 0.0
    crop: Literal["center", "random"] = "random"
    """Random crops come from an image enlarged by up to a quarter."""
    flip: bool = True
    """Mirror half of the images; not for digits and letters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products; bfloat16 is for GPUs."""
    seed: int = 0
    """Of the first weights, the order, crops and flips."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise UserError(f"architecture '{self.architecture}' is unknown; choose one of {', '.join(get_args(Architecture))}")
        for name, value, least in (
            ("batch_size", self.batch_size, 2),
            ("num_epochs", self.num_epochs, 1),
            ("num_steps", self.num_steps, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise UserError(f"learning_rate must be above 0 and weight_decay not below, got {self.learning_rate} and {self.weight_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in 0 .. 1, got {self.label_smoothing}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number of at least 0, got {self.seed}")

    def steps_for(self, num_images: int) -> int:
        """Batches for a training set of that size."""
        return self.num_steps or math.ceil(self.num_epochs * num_images / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Classifying:
    """Training and using classifiers of one kind; it holds no weights."""

    config: ClassifierConfig
    num_steps: int
    image_size: int
    num_classes: int
    num_workers: int
    device: str
    show_progress: bool

    def train(self, source: ImageSource, translation: np.ndarray, description: str) -> tuple[nn.Module, float]:
        """A classifier in eval mode, trained on a source whose labels are translated by [K]; and the mean loss of the last steps."""
        config = self.config
        dataset = ImageDataset(source, self.image_size, crop=config.crop, flip=config.flip, seed=config.seed)
        dataset.labels = translation[source.labels]
        stream = batches(dataset, seed=config.seed, batch_size=config.batch_size, num_workers=self.num_workers, end_step=self.num_steps)
        network = build_classifier(config.architecture, self.num_classes, self.image_size, config.seed).to(self.device)
        network.train().to(memory_format=torch.channels_last)
        peak = config.learning_rate * config.batch_size / 256
        optimizer = torch.optim.SGD(_decayed(network, config.weight_decay), lr=peak, momentum=MOMENTUM, nesterov=True)
        progress = Progress(self.num_steps * config.batch_size, description, show=self.show_progress)
        losses: list[float] = []
        with exact_float32(), torch.enable_grad():
            for step, batch in enumerate(stream):
                for group in optimizer.param_groups:
                    group["lr"] = peak * _schedule(step, self.num_steps)
                images = batch["images"].to(self.device).contiguous(memory_format=torch.channels_last)
                with _autocast(self.device, config.dtype):
                    logits = network(images)
                loss = F.cross_entropy(logits.float(), batch["labels"].to(self.device), label_smoothing=config.label_smoothing)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"{description}: the loss is {losses[-1]} at step {step}; lower --learning-rate ({config.learning_rate:g})"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                progress.advance(len(images), note=f"loss {losses[-1]:.3f}")
        progress.close()
        return network.eval().requires_grad_(False), float(np.mean(losses[-max(1, self.num_steps // 20) :]))

    @torch.no_grad()
    def rank(self, network: nn.Module, source: ImageSource, description: str) -> np.ndarray:
        """The five classes (or all, if fewer) that the classifier finds likeliest for each image, best first: int64 [N, 5]."""
        rows = []
        progress = Progress(len(source), description, show=self.show_progress)
        with exact_float32():
            for batch in ordered_batches(source, self.image_size, batch_size=self.config.batch_size, num_workers=self.num_workers):
                images = from_uint8(batch["images"]).to(self.device).contiguous(memory_format=torch.channels_last)
                with _autocast(self.device, self.config.dtype):
                    logits = network(images).float()
                # a stable sort, so that equal logits give the same order everywhere
                rows.append(logits.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu().numpy())
                progress.advance(len(images))
        progress.close()
        return np.concatenate(rows)


def build_classifier(architecture: Architecture, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """A ResNet with random weights that depend on the seed alone: float [B, 3, H, W] -> [B, K].

    `resnet20` is the one of 0.27 million parameters for CIFAR-10 (He et al., arXiv:1512.03385, section 4.2).
    """
    import torchvision

    with torch.random.fork_rng(devices=[]):  # layers fill themselves from the global state
        torch.random.default_generator.manual_seed(seed)
        if architecture == "resnet20":
            return _narrow_resnet(num_classes)
        network: nn.Module = getattr(torchvision.models, architecture)(num_classes=num_classes)
        if image_size <= SMALL_SIDE:
            network.conv1, network.maxpool = _small_stem(64), nn.Identity()
    return network


def _small_stem(width: int) -> nn.Conv2d:
    stem = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _narrow_resnet(num_classes: int, widths: Sequence[int] = (16, 32, 64), blocks_per_stage: int = 3) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, conv1x1

    layers: list[nn.Module] = [_small_stem(widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    width = widths[0]
    for stage, wider in enumerate(widths):
        for i in range(blocks_per_stage):
            stride = 2 if stage and not i else 1
            shortcut = nn.Sequential(conv1x1(width, wider, stride), nn.BatchNorm2d(wider)) if stride > 1 else None
            layers.append(BasicBlock(width, wider, stride, shortcut))
            width = wider
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _schedule(step: int, num_steps: int) -> float:
    """Linear rise over the first twentieth, then half a cosine; in (0, 1]."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _decayed(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay on matrices and kernels only."""
    parameters: list[Tensor] = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _autocast(device: str, dtype: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
