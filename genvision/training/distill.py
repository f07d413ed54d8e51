"""Calibrating ternary weights without data: a student learns to say what the float model says, on codes that this one drew itself.

1.58-bit FLUX (arXiv:2412.18653) speaks of such self-supervision, without its details; the losses here are the plain ones. For LlamaGen the
divergence KL(teacher || student) of next-token distributions, for DiT the squared distance of predictions at random times.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genvision.errors import UserError
from genvision.models.dit import DiT
from genvision.models.llamagen import LlamaGen
from genvision.objectives.denoising import DenoisingObjective
from genvision.objectives.diffusion import DiffusionLoss, DiffusionLossConfig
from genvision.objectives.draws import TrainingDraws
from genvision.objectives.flow import FlowLossConfig, FlowMatching
from genvision.streams import Purpose

Batch = dict[str, Tensor]


def distill_ternary(
    teacher: Any,
    student: Any,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a student in place to follow a teacher.

    What is trained are the student's parameters that require gradients: the float weights behind TernaryLinear, straight through, or the
    scales and biases of PackedTernaryLinear, whose codes stay; and beside them whatever was not made ternary. Both models are called in
    eval mode, so without dropout.

    Args:
        teacher: a LlamaGen or a DiT; it stays as it is.
        student: the same with ternary layers.
        batches: at least `steps` of them: `codes` that the teacher's sampler drew and `labels`, and `positions`, int64 [B], the number of
            each sample, on which dropped labels, times and noise depend.
        steps: of Adam, whose rate falls from `lr` to zero along half a cosine.
        told: called with every step, counted from 1, and its loss.

    Returns:
        The loss of each step.

    Raises:
        UserError: there are too few batches, or no such loss for the family.
    """
    loss_of = _loss_of(teacher, seed)
    teacher.eval(), student.eval()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for batch in batches:
        if len(losses) == steps:
            break
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * len(losses) / steps)) / 2
        loss = loss_of(student, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if told is not None:
            told(len(losses), losses[-1])
    if len(losses) < steps:
        raise UserError(f"calibration: {steps} steps were asked for, but there are {len(losses)} batches; draw more, or take fewer steps")
    return losses


def _loss_of(teacher: Any, seed: int) -> Callable[[Any, Batch], Tensor]:
    if isinstance(teacher, LlamaGen):
        return lambda student, batch: next_token_divergence(teacher, student, batch, seed=seed)
    if isinstance(teacher, DiT):
        if teacher.scale_embed is not None:
            raise UserError("calibration: is not there for a DiT that is told the guidance scale; convert it without")
        return lambda student, batch: prediction_distance(teacher, student, batch, seed=seed)
    raise UserError(f"calibration: is there for LlamaGen and DiT, not for {type(teacher).__name__}; convert it without")


def next_token_divergence(teacher: LlamaGen, student: Any, batch: Batch, *, seed: int = 0) -> Tensor:
    """KL(teacher || student) in nats, mean over tokens; labels are dropped as often as in the teacher's training."""
    codes, labels = batch["codes"].flatten(1), batch["labels"]
    drop = _dropped(teacher, batch, seed)
    with torch.no_grad():
        wanted = teacher(codes[:, :-1], labels, drop=drop).log_softmax(-1)  # [B, N, V]
    given = student(codes[:, :-1], labels, drop=drop).log_softmax(-1)
    return F.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)


def prediction_distance(teacher: DiT, student: Any, batch: Batch, *, seed: int = 0) -> Tensor:
    """Mean squared distance of all outputs at the times and with the noise that training would draw for these positions."""
    codes, draws = batch["codes"].float(), TrainingDraws(seed, batch["positions"])
    noised = _objective(teacher, seed, len(codes)).noised(codes, draws.noise(codes.shape[1:]), draws.uniform(Purpose.TRAINING_TIME))
    drop = _dropped(teacher, batch, seed)
    with torch.no_grad():
        wanted = teacher(noised.x_t, noised.network_time, batch["labels"], drop=drop)
    return F.mse_loss(student(noised.x_t, noised.network_time, batch["labels"], drop=drop), wanted)


def _objective(teacher: DiT, seed: int, batch_size: int) -> DenoisingObjective:
    """Which times there are, and how noise gets in."""
    if teacher.config.path == "ddpm":
        return DiffusionLoss(DiffusionLossConfig(), teacher, seed=seed, batch_size=batch_size)
    return FlowMatching(FlowLossConfig(), teacher, seed=seed, batch_size=batch_size)


def _dropped(teacher: Any, batch: Batch, seed: int) -> Tensor:
    """Boolean [B]."""
    u = TrainingDraws(seed, batch["positions"]).uniform(Purpose.LABEL_DROPOUT)
    return u < teacher.config.class_dropout if teacher.has_null_label else torch.zeros_like(u, dtype=torch.bool)
