"""Checks before a row is timed: a faster wrong answer is no result."""

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference of float32 outputs, relative to the largest of them, where both sum in another order."""


class WrongAnswer(Exception):
    """Outputs differ by more than arithmetic explains."""


def check_close(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> str:
    """Compares with `tolerance` times the largest of the expected numbers; says how far they agree.

    Raises:
        WrongAnswer: they differ by more, or by what is not finite, or in shape.
    """
    if found.shape != expected.shape:
        raise WrongAnswer(f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}")
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:  # not finite ones included
        raise WrongAnswer(f"{what}: differs by {difference:.1e} of the largest number, {tolerance:g} is allowed")
    return f"{what}: within {difference:.0e}" if difference else f"{what}: equal"


def check_tokens(what: str, found: Tensor, expected: Tensor) -> str:
    """Compares tokens int64 [B, N] one by one.

    Raises:
        WrongAnswer: some differ.
    """
    if found.shape != expected.shape or not torch.equal(found, expected):
        same = f"{(found == expected).sum()} of {expected.numel()}" if found.shape == expected.shape else "shapes differ, none"
        raise WrongAnswer(f"{what}: {same} tokens are equal")
    return f"{what}: all {expected.numel()} tokens equal"
