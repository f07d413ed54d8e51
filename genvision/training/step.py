"""One optimiser step: forward and backward passes of all parts, one agreement between processes, and the update if it is good."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genvision.training.stage import Batch, Stage
from genvision.training.trainee import Trainee

MEAN_LOSS_DECAY, STEPS_OF_MEAN = 0.99, 100
"""Of the running mean that a loss is compared with, and the good steps before it is trusted."""


class Gradients(NamedTuple):
    """What the passes of one step gave, in this process."""

    terms: dict[str, Tensor]
    """Means over the parts."""
    norms: dict[str, float]
    """`grad_norm`, `adversary_grad_norm`: before clipping; the same in every process."""
    trained: list[Trainee]
    """Networks that have gradients."""


class Verdict(NamedTuple):
    """What all processes agree on behind the passes of one step."""

    is_good: bool
    """Loss and gradients are finite everywhere, and the loss has not exploded."""
    is_overflow: bool
    """Gradients alone are not finite, in fp16 with a scale above 1: it was too large and will be smaller, which is no fault."""
    stop: bool
    """Some process was asked to stop."""
    data_failed: bool
    """Some process could not read its next batch."""


class Stepper:
    """Runs the steps of a training.

    Args:
        trainees: the model first, then the adversary where there is one.
        accumulation: parts of a process's batch.
        explode_factor: a loss above so many times its running mean is as bad as one that is not finite; None leaves that out.
    """

    def __init__(
        self, accelerator: Accelerator, stage: Stage, trainees: list[Trainee], accumulation: int, explode_factor: float | None
    ) -> None:
        self.accelerator, self.stage, self.trainees, self.accumulation = accelerator, stage, trainees, accumulation
        self.main, self.explode_factor = trainees[0], explode_factor
        self.mean_loss, self.num_good = 0.0, 0
        for network in [] if stage.adversary is None else stage.adversary.statistics:
            network.to(accelerator.device)  # now: what moves later leaves the tensors that are watched here
        watched = [trainee.network for trainee in trainees] + ([] if stage.adversary is None else [*stage.adversary.statistics])
        self._statistics = [tensor for network in watched for tensor in running_statistics(network)]
        self._before: list[tuple[Tensor, Tensor]] = []

    def passes(self, batch: Batch) -> Gradients:
        """Forward and backward passes of a batch, and clipping."""
        accelerator, totals = self.accelerator, dict[str, Tensor]()
        self.main.share_buffers()
        self._remember_statistics()
        chunks = zip(*(value.chunk(self.accumulation) for value in batch.values()), strict=True)
        parts = [dict(zip(batch, values, strict=True)) for values in chunks]
        for i, part in enumerate(parts):
            part = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in part.items()}
            # split gradients (FSDP2) are summed up where they belong part by part, or each process would need room for all of them
            in_one_go = i == len(parts) - 1 or self.main.sharding is not None
            with nullcontext() if in_one_go else accelerator.no_sync(self.main.model):
                with accelerator.autocast():
                    terms = self.stage.loss(self.main.model, part)
                accelerator.backward(terms["loss"] / len(parts))
            terms |= self._adversary_terms(part, len(parts))
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=accelerator.device)) + value.detach() / len(parts)
        trained = [trainee for trainee in self.trainees if trainee is self.main or "adversary_loss" in totals]
        norms = {}
        for trainee in trained:
            trainee.average_gradients()
            # an averaged gradient is the same everywhere, so the norm is, and so every process skips the same steps
            norms["grad_norm" if trainee is self.main else "adversary_grad_norm"] = trainee.clip_gradients()
        return Gradients(totals, norms, trained)

    def _adversary_terms(self, part: Batch, num_parts: int) -> dict[str, Tensor]:
        """Backward pass of the adversary, while both networks still have the weights with which the step began."""
        if self.stage.adversary is None:
            return {}
        with self.accelerator.autocast():
            terms = self.stage.adversary.loss(part)
        if terms is None:
            return {}
        self.accelerator.backward(terms["adversary_loss"] / num_parts)
        return terms

    def agree(self, gradients: Gradients, *, stop: bool, data_failed: bool) -> Verdict:
        """One reduction over all processes."""
        losses = [float(gradients.terms[name]) for name in ("loss", "adversary_loss") if name in gradients.terms]
        bad_loss = not all(math.isfinite(value) for value in losses)
        bad_norm = not all(math.isfinite(value) for value in gradients.norms.values())
        loss = losses[0] if not bad_loss else 0.0
        num = self.accelerator.num_processes
        if num > 1:
            mine = torch.tensor([bad_loss, bad_norm, stop, data_failed, loss], dtype=torch.float32, device=self.accelerator.device)
            *votes, loss = self.accelerator.reduce(mine, "sum").tolist()
            bad_loss, bad_norm, stop, data_failed = (vote > 0 for vote in votes)
            loss = loss / num
        is_good = not bad_loss and not bad_norm and not self._explodes(loss)
        scaler = self.accelerator.scaler
        is_overflow = bad_norm and not bad_loss and scaler is not None and scaler.get_scale() > 1
        return Verdict(is_good, is_overflow, stop, data_failed)

    def _explodes(self, loss: float) -> bool:
        if self.explode_factor is None:
            return False
        if self.num_good >= STEPS_OF_MEAN and loss - self.mean_loss > (self.explode_factor - 1) * abs(self.mean_loss):
            return True
        decay = min(MEAN_LOSS_DECAY, self.num_good / (self.num_good + 1))
        self.mean_loss = decay * self.mean_loss + (1 - decay) * loss
        self.num_good += 1
        return False

    def update(self, gradients: Gradients, verdict: Verdict) -> None:
        """Change the weights if the step is good; else leave all as it was before the passes."""
        scaler = self.accelerator.scaler
        if not verdict.is_good:
            for tensor, before in self._before:
                tensor.copy_(before)
        for trainee in gradients.trained if verdict.is_good else []:
            optimizer = trainee.optimizer.optimizer
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()  # once, whatever the number of optimisers, and at bad steps too: they make the scale smaller
        for trainee in self.trainees:
            trainee.optimizer.zero_grad(set_to_none=True)

    def _remember_statistics(self) -> None:
        """What a forward pass changes: running statistics, and codes that move by averages. One bad batch would spoil them for good."""
        self._before = [(tensor, tensor.detach().clone()) for tensor in self._statistics]

    def state_dict(self) -> dict[str, float]:
        return {"mean_loss": self.mean_loss, "num_good": self.num_good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_loss, self.num_good = state["mean_loss"], state["num_good"]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Tensors that a forward pass may change: floating-point buffers, and untrained parameters of modules that have such buffers."""
    found: dict[int, Tensor] = {}
    for module in network.modules():
        buffers = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
        if buffers:
            frozen = [parameter.data for parameter in module.parameters() if not parameter.requires_grad]
            found |= {id(tensor): tensor for tensor in [*buffers, *frozen] if not isinstance(tensor, DTensor)}
    return [*found.values()]
