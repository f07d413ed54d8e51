"""AdamW parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from genvision.training.config import OptimConfig


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
