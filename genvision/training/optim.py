"""AdamW parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from genvision.errors import UserError
from genvision.training.config import OptimConfig


def freeze_all_but(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Leave gradients to the parameters whose names begin with one of `prefixes`, whole parts of a dotted name; to all if there are none.

    Raises:
        UserError: no name begins so.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name == prefix or name.startswith(f"{prefix}.") for name in names):
            parts = dict.fromkeys(name.split(".")[0] for name in names)
            raise UserError(f"optim.train_only {prefix}: the model has no part of that name; its parts are {', '.join(parts)}")
    for name, parameter in model.named_parameters():
        trained = any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        if prefixes and not trained:
            parameter.requires_grad_(False)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on tensors of two or more dimensions (embeddings and heads included), none on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in parameters) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Of step 0 .. num_steps - 1: linear warm-up from lr / warmup_steps, then constant or half a cosine to the final rate."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    final = config.lr * config.final_lr_ratio
    return final + (config.lr - final) * (1 + math.cos(math.pi * progress)) / 2
