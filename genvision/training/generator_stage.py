"""Training a generator: its objective on codes, from an encoded data set or through a frozen tokenizer."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Objective = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


class GeneratorStage:
    """An objective on batches of codes and labels.

    Args:
        model: the generator.
        objective: gives named terms, `loss` among them; its `baselines` are shown beside them.
        tokenizer: makes codes of batches that hold images; it stays as it is.
    """

    def __init__(self, model: nn.Module, objective: Any, tokenizer: nn.Module) -> None:
        self.model, self.objective, self.tokenizer = model, objective, tokenizer.requires_grad_(False).eval()
        self.baselines: dict[str, float] = objective.baselines
        self.adversary = None

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "codes" not in batch:
            images = batch["images"]
            # codes are made in float32 whatever the generator's precision, as `genvision encode` makes them
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                self.tokenizer.to(images.device)
                batch = {"codes": self.tokenizer.encode(images), "labels": batch["labels"]}  # type: ignore[operator]
        terms: dict[str, Tensor] = self.objective(model, batch)
        return terms

    def after_step(self, step: int, accelerator: Accelerator) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""
