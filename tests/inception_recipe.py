"""Random weights for Inception that anyone can make again: the recipe in the metadata of the fixture eval_inception_tiny."""

import zlib

import numpy as np
import torch

from genvision.eval.inception import inception_shapes


def inception_tensors() -> dict[str, torch.Tensor]:
    """All tensors of the official file, float32, by name."""
    return {name: _random_tensor(name, shape) for name, shape in inception_shapes().items()}


def _random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    z = np.random.RandomState((zlib.crc32(name.encode()) + 20240601) % 2**32).standard_normal(tuple(shape))
    if name.endswith("conv.weight"):
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        z = 1 + 0.1 * z
    elif name.endswith("running_var"):
        z = np.exp(0.2 * z)
    elif name == "fc.weight":
        z = 0.05 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(z).float()
