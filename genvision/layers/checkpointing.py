"""Which activations are kept for the backward pass, and which are computed again in it (arXiv:1604.06174).

Of n blocks, `block` keeps what each of them reads, and runs one after the other again: one more forward pass. `sqrt` keeps what every
ceil(n / k)-th of them reads, k = ceil(sqrt(n)), and runs one such segment at a time again, in which `block` holds: two more forward passes,
less one block of each segment. With one more pass alone all activations of a segment would be alive at once, and these are 15 to 40 times
what a block reads: more than the inputs of all blocks, which `block` keeps. Most that was alive at once, in inputs of a block of ViTok:

    n      none   block   segments alone   sqrt
    24      347      45               82     29
    64      913      85              128     36

Random numbers (dropout) and autocast are the same in every pass, so gradients do not change by a bit.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genvision.errors import UserError

POLICIES = ("none", "block", "sqrt")

State = TypeVar("State")


def set_checkpointing(model: nn.Module, policy: str) -> None:
    """Decide what a model keeps in training; diffusers' `enable_gradient_checkpointing` is `block`.

    Args:
        model: has `Trunk`s, or modules of diffusers, which know no segments.
        policy: one of `POLICIES`.

    Raises:
        UserError: the policy is unknown, or not possible for this model.
    """
    if policy not in POLICIES:
        raise UserError(f"train.gradient_checkpointing '{policy}' is unknown; choose one of {', '.join(POLICIES)}")
    switched = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if policy != "none" and not switched:
        raise UserError(f"train.gradient_checkpointing {policy}: {type(model).__name__} has no blocks to recompute; choose none")
    if policy == "sqrt" and not all(isinstance(module, Trunk) for module in switched):
        raise UserError(f"train.gradient_checkpointing sqrt: {type(model).__name__} runs its blocks one by one; choose block")
    for module in switched:
        module.gradient_checkpointing = policy != "none"  # type: ignore[assignment]
        module._gradient_checkpointing_func = recompute_segment if policy == "sqrt" else recompute_block  # type: ignore[assignment]


class Trunk:
    """Mixed into a module that runs blocks one after another; the two attributes are those that ModelMixin sets.

    A block must change nothing but its output when it is called: counters of codes or moving averages would advance twice.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def run_blocks(self, call: Callable[[int, State], State], num_blocks: int, state: State, *, writes_cache: bool = False) -> State:
        """What the last block gives.

        Args:
            call: gives the state behind block i from that before it; it must call the block, not its `forward` or its parts, since
                sharded weights are gathered by hooks.
            state: what goes from block to block, a tensor or a tuple of tensors.
            writes_cache: the blocks store keys and values on their way, so nothing is run twice.
        """
        if not self.gradient_checkpointing or writes_cache or not torch.is_grad_enabled():
            return _run(call, range(num_blocks), state)
        recompute = self._gradient_checkpointing_func

        def block(i: int, state: State) -> State:
            return _recomputed(recompute, partial(call, i), state)

        if recompute is not recompute_segment:
            return _run(block, range(num_blocks), state)
        length = segment_length(num_blocks)
        for start in range(0, num_blocks, length):
            segment = range(start, min(start + length, num_blocks))
            state = _recomputed(recompute, partial(_run, block, segment), state)
        return state


def segment_length(num_blocks: int) -> int:
    """Blocks of a segment: about sqrt(n)."""
    return math.ceil(num_blocks / max(1, math.ceil(math.sqrt(num_blocks)))) or 1


def recompute_block(block: Callable[..., Any], *args: Any) -> Any:
    """The block's output; what it computes on the way is forgotten."""
    return checkpoint(block, *args, use_reentrant=False)


def recompute_segment(segment: Callable[..., Any], *args: Any) -> Any:
    """The same of several blocks; a `Trunk` tells by this function that they are meant."""
    return checkpoint(segment, *args, use_reentrant=False)


def _run(call: Callable[[int, State], State], blocks: range, state: State) -> State:
    for i in blocks:
        state = call(i, state)
    return state


def _recomputed(recompute: Callable[..., Any], part: Callable[[State], State], state: State) -> State:
    """The state behind a part, with each tensor as an argument of its own, since only such are known to autograd as saved."""
    if not isinstance(state, tuple):
        return recompute(part, state)
    return recompute(lambda *state: part(state), *state)
