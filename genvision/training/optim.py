"""Which parameters are trained, AdamW's groups of them, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from genvision.errors import UserError
from genvision.training.config import OptimConfig
from genvision.training.parts import named_parts


def freeze_all_but(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Leave gradients to the parameters that `parts` name, see `named_parts`; to all if there are none.

    A parameter that has no gradient by itself (a fixed table of positions) gets none.

    Raises:
        UserError: a part is not there, or none of them can be trained.
    """
    if not parts:
        return
    trained = named_parts(model, parts, "optim.train_only")
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"optim.train_only {', '.join(parts)}: nothing there is trained, these are fixed tables; name other parts")


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on tensors of two or more dimensions (embeddings and heads included), none on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if isinstance(p, DTensor) == is_split and (p.dim() >= 2) == is_decayed],
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for is_split in (True, False)  # fused AdamW takes no group of both
        for is_decayed in (True, False)
    ]
    fused = all(p.is_cuda for p in parameters) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Of step 0 .. num_steps - 1: linear warm-up from lr / warmup_steps, then constant, and half a cosine or a line to the final rate."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps if config.decay_steps is None else max(config.warmup_steps, num_steps - config.decay_steps)
    progress = max(step - begin, 0) / max(num_steps - begin, 1)
    final = config.lr * config.final_lr_ratio
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final + (config.lr - final) * left
