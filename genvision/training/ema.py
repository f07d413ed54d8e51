"""Exponential moving averages of a model's weights, several decays at once; split as the weights are, where those are split (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genvision.training.sharding import forget_gathered, local


class EMA:
    """Averages of every floating-point parameter of a model; other tensors of its state are copied, buffers included.

    Args:
        model: the source; read at construction and at every `update`.
        decays: one average each; average <- decay * average + (1 - decay) * weights.
        warmup: early on the decay is smaller, at step n at most (1 + n) / (10 + n), or a short run would end with an average of little
            but its random start. Without it the decay is the same from the first step on, as in DiT.
        network: a second instance of the model, split alike, that is to hold the first average, so that it can be called; needed only where
            something calls the average in training.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decays: tuple[float, ...], *, warmup: bool = True, network: nn.Module | None = None) -> None:
        self.model, self.decays, self.warmup, self.network = model, decays, warmup, network
        self.averages = {decay: {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} for decay in decays}
        if network is not None:
            self.averages[decays[0]] = network.requires_grad_(False).state_dict()
        self._trained = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps of training."""
        source = {name: local(tensor) for name, tensor in self.model.state_dict().items()}
        names = [name for name in source if name in self._trained]
        for decay, average in self.averages.items():
            into = [local(average[name]) for name in names]
            torch._foreach_lerp_(into, [source[name] for name in names], 1 - self.decay_at(step, decay))
            for name in source.keys() - self._trained:
                local(average[name]).copy_(source[name])
        if self.network is not None:
            forget_gathered(self.network)

    def decay_at(self, step: int, decay: float) -> float:
        """The decay in effect after `step` steps: with a warm-up `decay` in the end (from step 90,000 on if it is 0.9999)."""
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the first average in place of its own weights, in the mode (training or not) that it is in."""
        assert self.network is not None, "nothing was given to hold the average"
        return self.network.train(self.model.training)(*args, **kwargs)

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Within the block the model holds an average (the first decay's unless told) instead of its own weights."""
        if not self.decays:
            yield
            return
        own = {name: local(tensor).detach().clone() for name, tensor in self.model.state_dict().items()}
        self._put(self.averages[self.decays[0] if decay is None else decay])
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in self.model.state_dict().items():
            local(tensor).copy_(local(weights[name]))
        forget_gathered(self.model)

    def state_dict(self, decay: float) -> dict[str, Tensor]:
        """The tensors of an average, under the model's names; they are no copies."""
        return self.averages[decay]
