"""Tokenizers whose codes are known, and images to encode."""

from pathlib import Path

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

from genvision.data.encoding import encode_dataset
from genvision.data.sources import open_source
from genvision.tokenizers.base import ContinuousTokenizer, TokenizerSpec

NUM, SIZE, SHARD = 11, 8, 4


class MeanTokenizer:
    """Mean grey of patches of 4 x 4, in `codebook_size` levels (as it is, in two channels, for None); fails at batch number `fail_at`."""

    device = torch.device("cpu")

    def __init__(self, codebook_size=64, fail_at=None, flat=False):
        self.spec = TokenizerSpec(image_size=SIZE, downsample=4, codebook_size=codebook_size, channels=2 if codebook_size is None else None)
        self.fail_at, self.flat = fail_at, flat
        self.batch_sizes = []

    def encode(self, images):
        if len(self.batch_sizes) == self.fail_at:
            raise KeyboardInterrupt
        self.batch_sizes.append(len(images))
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
        if self.spec.codebook_size is None:
            codes = torch.stack([means, means.square() + 10], dim=1)
            return codes.flatten(2) if self.flat else codes
        codes = ((means + 1) / 2 * (self.spec.codebook_size - 1)).round().long()
        return codes.flatten(1) if self.flat else codes


class ListTokenizer:
    """Every image's codes are as many entries of a list, at places that its pixels choose."""

    device = torch.device("cpu")

    def __init__(self, entries, codebook_size):
        self.entries = torch.tensor(entries)
        self.spec = TokenizerSpec(image_size=SIZE, downsample=1, codebook_size=codebook_size)

    def encode(self, images):
        numbers = ((images + 1) * 127.5).round().long()
        return self.entries[(numbers[:, 0] * 256 + numbers[:, 1]) % len(self.entries)]


class LinearTokenizer(ContinuousTokenizer, ModelMixin, ConfigMixin):
    """One linear layer each way, standardised by channel."""

    @register_to_config
    def __init__(self, channels=3, latent_mean=0.5, latent_std=2.0):
        super().__init__()
        self.down = nn.Conv2d(3, channels, 4, stride=4)
        self.up = nn.ConvTranspose2d(channels, 3, 4, stride=4)

    @property
    def spec(self):
        return TokenizerSpec(image_size=SIZE, downsample=4, channels=self.config.channels)

    @property
    def last_layer(self):
        return self.up.weight

    def encode(self, images):
        return self.normalize(self.down(images))

    def decode(self, codes):
        self.check_codes(codes)
        return self.up(self.denormalize(codes))


def write_images(folder: Path, num: int = NUM) -> None:
    """Noise of 12 x 14 pixels: six of class a, the others of class b."""
    rng = np.random.default_rng(0)
    for i in range(num):
        path = folder / "ab"[min(1, i // 6)] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 12, 3), dtype=np.uint8)).save(path)


def open_images(folder: Path):
    write_images(folder)
    return open_source(f"folder:{folder}")


def encode(source, out, tokenizer=None, **options):
    options = {"image_size": SIZE, "tokenizer_hash": "a" * 64, "shard_size": SHARD, "batch_size": 4, **options}
    return encode_dataset(tokenizer or MeanTokenizer(), source, out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
