"""A classifier of 8x8 digits, trained on the spot in a few seconds: the offline stand-in for Inception, and the judge of class accuracy.

scikit-learn's digits come in two halves by different writers. The classifier of the first half gives the features (`digits` extractor);
the classifier of the second half is the judge: generators are trained on the first half, so it has seen none of their data.
Both depend on nothing but the seed: torch's global random state is neither used nor moved, and training runs on one thread.

Shapes: B images, gray pictures [B, 1, 8, 8] in [-1, 1] with the background at -1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.eval.features import as_pixels, tensors_hash

Half = Literal["first", "second"]
SIDE = 8
SEED = 0
NUM_EPOCHS = 30
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
DROPOUT = 0.3
LABEL_SMOOTHING = 0.02


class DigitsNetwork(nn.Module):
    """Three convolutions and two linear layers: uint8 [B, 3, H, W] -> features [B, 64], logits [B, 10]."""

    def __init__(self, width: int = 24, feature_dim: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * (SIDE // 2) ** 2, feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(feature_dim, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(to_gray(pixels))
        return features, self.head(features)


class DigitsJudge:
    """Names the digit in each picture; trained on the half that generators do not see."""

    def __init__(self, half: Half = "second") -> None:
        self.network = digits_classifier(half)
        self.weights_hash = tensors_hash(self.network.state_dict())

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> np.ndarray:
        """uint8 [B, H, W, 3] -> int64 [B], digits 0 to 9."""
        _, logits = self.network(as_pixels(images).cpu())
        labels: np.ndarray = logits.argmax(dim=1).numpy()
        return labels

    def accuracy(self, images: np.ndarray | Tensor, labels: np.ndarray) -> float:
        """Fraction of pictures that show the digit asked for."""
        return float(np.mean(self(images) == labels))


@cache
def digits_judge() -> DigitsJudge:
    """The judge of `class_accuracy`: trained on `digits:second`; made once per process."""
    return DigitsJudge("second")


@cache
def digits_classifier(half: Half) -> DigitsNetwork:
    """The frozen classifier of one half; trained once per process. Copy it before you move or change it."""
    return train_digits_classifier(half)


def train_digits_classifier(half: Half) -> DigitsNetwork:
    """Train on one half of the digits with small random shifts, turns and stretches; equal weights at each call on one machine.

    Raises:
        UserError: scikit-learn, which carries the digits, is not installed.
    """
    gray, labels = _digits(half)
    generator = torch.Generator().manual_seed(SEED)
    with one_thread(), torch.enable_grad():
        with torch.random.fork_rng(devices=[]):  # layers fill themselves from the global state before we do
            network = DigitsNetwork().train().to(memory_format=torch.channels_last)  # a fifth off the time
        _initialise(network, generator)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        steps_per_epoch = len(gray) // BATCH_SIZE
        num_steps = NUM_EPOCHS * steps_per_epoch
        for epoch in range(NUM_EPOCHS):
            order = torch.randperm(len(gray), generator=generator)
            shown, wanted = jitter(gray[order], generator), labels[order]
            # nn.Dropout and its kind draw from the global state only
            kept = (torch.rand(len(gray), network.head.in_features, generator=generator) >= DROPOUT).float() / (1 - DROPOUT)
            for i in range(steps_per_epoch):
                step = epoch * steps_per_epoch + i
                warmup = min(1.0, (step + 1) / WARMUP_STEPS)
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
                batch = slice(i * BATCH_SIZE, (i + 1) * BATCH_SIZE)
                logits = network.head(network.trunk(shown[batch]) * kept[batch])
                loss = F.cross_entropy(logits, wanted[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval().requires_grad_(False)


def to_gray(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] of any size -> float32 [B, 1, 8, 8] in [-1, 1], averaged over areas and channels."""
    gray = pixels.float().mean(dim=1, keepdim=True) / 127.5 - 1
    return gray if gray.shape[-2:] == (SIDE, SIDE) else F.interpolate(gray, size=(SIDE, SIDE), mode="area")


def jitter(gray: Tensor, generator: torch.Generator, shift: float = 0.15, turn: float = 0.15, stretch: float = 0.15) -> Tensor:
    """Move, turn, stretch and shear each picture a little, with background around it.

    Args:
        shift: at most, in half sides (0.15 is 0.6 pixels); `turn`: at most, in radians; `stretch`: at most, as a part of 1.
    """
    draws = torch.rand(7, len(gray), generator=generator) * 2 - 1
    angle = draws[0] * turn
    scale_x, scale_y, shear = 1 + draws[1] * stretch, 1 + draws[2] * stretch, draws[3] * stretch
    first_row = torch.stack([scale_x * angle.cos(), shear - angle.sin(), draws[4] * shift], dim=1)
    second_row = torch.stack([angle.sin(), scale_y * angle.cos(), draws[5] * shift], dim=1)
    grid = F.affine_grid(torch.stack([first_row, second_row], dim=1), list(gray.shape), align_corners=False)
    return F.grid_sample(gray + 1, grid, align_corners=False) - 1  # outside is 0 to grid_sample and -1, the background, to us


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums are taken in one order on every machine; the old number comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _convolution(num_in: int, num_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _digits(half: Half) -> tuple[Tensor, Tensor]:
    """Gray pictures [N, 1, 8, 8] and labels [N] of one half."""
    from genvision.data.sources import open_source

    source = open_source(f"digits:{half}")
    pictures = np.stack([np.asarray(source.load(i)) for i in range(len(source))])
    return to_gray(as_pixels(pictures)), torch.from_numpy(np.asarray(source.labels))
