"""LARS: layer-wise adaptive rate scaling (You, Gitman and Ginsburg, arXiv:1708.03888), the optimiser of linear probes in large batches.

With gradient g, weights w, momentum m, decay b and trust coefficient n, a step of rate r is

    d = g + b w        q = n |w| / |d| (1 where either norm is 0)        v = m v + q d        w = w - r v

The paper multiplies by r before the momentum; here r stands outside, as in torch's SGD and in the code of the probes that MoCo v3, MAE and
MAGE report. The two differ only while r changes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """The rule above for tensors of two or more dimensions; others (biases, norms) get plain momentum without decay or scaling.

    Args:
        params: as torch's optimisers take them.
        lr: r.
        momentum: m.
        weight_decay: b.
        trust_coefficient: n.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        if wrong := [f"{name} {value}" for name, value in options.items() if value < 0]:
            raise ValueError(f"{wrong[0]}: at least 0 is expected")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the loss, if a closure computes it anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                direction = weight.grad
                if weight.dim() > 1:
                    direction = direction.add(weight, alpha=group["weight_decay"])
                    direction = direction * _trust_ratio(weight, direction, group["trust_coefficient"])
                state = self.state[weight]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(weight)
                weight.sub_(state["velocity"].mul_(group["momentum"]).add_(direction), alpha=group["lr"])
        return loss


def _trust_ratio(weight: Tensor, direction: Tensor, coefficient: float) -> Tensor:
    weight_norm, norm = weight.norm(), direction.norm()
    return torch.where((weight_norm > 0) & (norm > 0), coefficient * weight_norm / norm, 1.0)
