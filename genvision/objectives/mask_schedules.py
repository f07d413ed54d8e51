"""How many tokens are masked: a part of all of them as a function of progress (MaskGIT, arXiv:2202.04200, section 3.3).

Sampling goes along a schedule from progress 0 (all masked) to 1 (none); training draws the progress of a sample uniformly.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor

from genvision.errors import UserError

SMALLEST = 1e-6
NAMES = "cosine, arccos, linear, square, root, pow<X> (pow3, say), exp or log"
POWERS = {"linear": 1.0, "square": 2.0, "root": 0.5}


def check_schedule(name: str) -> None:
    """Raises UserError for an unknown schedule."""
    masked_fraction(name, torch.zeros(1), 2)


def masked_fraction(name: str, progress: Tensor, num_tokens: int) -> Tensor:
    """Part of the tokens that is masked, in [1e-6, 1].

    cosine: cos(pi r / 2); arccos: arccos(r) / (pi / 2), its inverse function; pow<X>: 1 - r^X; linear, square, root: X = 1, 2 and 1/2;
    exp: 1 - N^(r - 1); log: -log(r) / log(N).

    Args:
        name: of the schedule.
        progress: r in [0, 1], any shape, float, on the CPU.
        num_tokens: N, which exp and log depend on.

    Raises:
        UserError: the name is unknown.
    """
    power = re.fullmatch(r"pow(\d+(?:\.\d+)?)", name)
    if name == "cosine":
        fraction = torch.cos(math.pi / 2 * progress)
    elif name == "arccos":
        # numpy's, as originally: torch's differs in the last bit, which moves a token where a third of them is met
        fraction = torch.from_numpy(np.arccos(progress.numpy())) / (math.pi / 2)
    elif name == "exp":
        fraction = 1 - num_tokens ** (progress - 1)
    elif name == "log":
        fraction = -torch.log(progress) / math.log(num_tokens)
    elif name in POWERS or (power is not None and float(power[1]) > 0):
        fraction = 1 - progress ** (float(power[1]) if power is not None else POWERS[name])
    else:
        raise UserError(f"schedule '{name}' is unknown; choose {NAMES}")
    return fraction.clamp(SMALLEST, 1.0)


def masked_after_steps(
    name: str, num_unknown: int, num_steps: int, *, dtype: torch.dtype = torch.float64, round_up: bool = False
) -> list[int]:
    """How many of `num_unknown` tokens are still masked after each step, the last of which reveals all.

    At least one is revealed a step while more than one is masked; a schedule that is quicker ends with steps that draw the last one again.

    Args:
        num_unknown: at the beginning, at least `num_steps`.
        dtype: in which the schedule is computed. The original MaskGIT does it in float32, which falls just below whole numbers where a
            progress of 2/3 is met (256 tokens in 6, 12, 18 or 24 steps).
        round_up: parts of tokens count as masked; Halton-MaskGIT rounds the number of those that are known down instead.
    """
    progress = (torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps).to(dtype)
    exact = num_unknown * masked_fraction(name, progress, num_unknown)
    wanted = (exact.ceil() if round_up else exact.floor()).long().tolist()
    masked, counts = num_unknown, []
    for i, count in enumerate(wanted):
        masked = max(1, min(masked - 1, count)) if i + 1 < num_steps else 0
        counts.append(masked)
    return counts
