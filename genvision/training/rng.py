"""The random state that a process trains with: seeded once, saved with each checkpoint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block (building a model, say) with torch's generators seeded, and put their state back afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def start(seed: int, step: int, rank: int) -> None:
    """Give this process its own random state, a function of its arguments alone."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2, dtype=np.uint64)
    torch.manual_seed(int(words[0]) % 2**63)
    random.seed(int(words[1]))


def state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
    }


def restore(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"][0])  # of the device of this process, whatever its number
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
