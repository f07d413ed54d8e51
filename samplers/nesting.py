"""Which nested network each step of a masked sampler uses, as text: `8x3,4x3,2x3,1x3` (MaGNeTS, arXiv:2502.00382)."""

import re

from genvision.errors import UserError


def parse_nesting(text: str, num_steps: int) -> list[int]:
    """p of each step: one number is for all of them, and `PxN` for N of them.

    Raises:
        UserError: not of this form, or of another number of steps.
    """
    if re.fullmatch(r"[1-9]\d*", text):
        return [int(text)] * num_steps
    parts = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise UserError(f"nesting '{text}' is not understood; give one number, or parts like 8x3,4x3,2x3,1x3 (an eighth for 3 steps, ...)")
    nestings = [int(part[1]) for part in parts if part for _ in range(int(part[2]))]
    if len(nestings) != num_steps:
        raise UserError(f"nesting '{text}' is for {len(nestings)} steps, and num_steps is {num_steps}; make them agree")
    return nestings
