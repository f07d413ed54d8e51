"""Exponential moving averages of a model's weights, several decays at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class EMA:
    """Averages of every floating-point tensor of a model's state; other tensors are copied, buffers included.

    Args:
        model: the source; read at construction and at every `update`.
        decays: one average each; average <- decay * average + (1 - decay) * weights.
        warmup: early on the decay is smaller, at step n at most (1 + n) / (10 + n), or a short run would end with an average of little
            but its random start. Without it the decay is the same from the first step on, as in DiT.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decays: tuple[float, ...], *, warmup: bool = True) -> None:
        self.model, self.decays, self.warmup = model, decays, warmup
        self.averages = {decay: {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} for decay in decays}
        self._trained = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps of training."""
        source = self.model.state_dict()
        names = [name for name in source if name in self._trained]
        for decay, average in self.averages.items():
            torch._foreach_lerp_([average[name] for name in names], [source[name] for name in names], 1 - self.decay_at(step, decay))
            for name in source.keys() - self._trained:
                average[name].copy_(source[name])

    def decay_at(self, step: int, decay: float) -> float:
        """The decay in effect after `step` steps: with a warm-up `decay` in the end (from step 90,000 on if it is 0.9999)."""
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the first average in place of its own weights."""
        return functional_call(self.model, self.averages[self.decays[0]], args, kwargs)

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Within the block the model holds an average (the first decay's unless told) instead of its own weights."""
        if not self.decays:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.averages[self.decays[0] if decay is None else decay])
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def state_dict(self, decay: float) -> dict[str, Tensor]:
        return self.averages[decay]

    @torch.no_grad()
    def load_state_dict(self, decay: float, state: dict[str, Tensor]) -> None:
        for name, tensor in self.averages[decay].items():
            tensor.copy_(state[name])
