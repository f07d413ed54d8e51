"""A network in training: its weights, its optimiser and its learning rate; the model itself, and an adversary where there is one."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from genvision.training.config import OptimConfig
from genvision.training.optim import learning_rate, make_optimizer
from genvision.training.state import CheckpointFolder, save_tensors


class Trainee:
    """One network and what trains it.

    Args:
        network: what is trained; its optimiser sees the parameters that require gradients now.
        config: of the optimiser.
        num_steps: of the run.
        files: names in a checkpoint of its weights and of its optimiser's state.
        wrap: let Accelerate wrap it (DDP averages gradients in its backward pass). A network that is called several times in one step must
            not be wrapped; `average_gradients` serves it.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        num_steps: int,
        accelerator: Accelerator,
        *,
        files: tuple[str, str],
        wrap: bool = True,
    ) -> None:
        self.network, self.config, self.num_steps, self.accelerator, self.files = network, config, num_steps, accelerator, files
        optimizer = make_optimizer(network, config)
        network.train()
        network.to(accelerator.device)
        self.model = accelerator.prepare(network) if wrap else network
        self.optimizer = accelerator.prepare(optimizer)

    def set_learning_rate(self, step: int) -> float:
        """The rate of this step, which is also set."""
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def average_gradients(self) -> None:
        """Mean over processes, for a network that is not wrapped."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def clip_gradients(self) -> float | None:
        """Norm of the gradients before they are clipped; None where they are not clipped."""
        if self.config.max_grad_norm is None:
            return None
        # not accelerator.clip_grad_norm_, which would unscale the gradients of every network at once, and fail at the second
        self.accelerator.unscale_gradients(self.optimizer)
        return float(nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm))

    def save(self, folder: Path) -> None:
        save_tensors(folder / self.files[0], self.network.state_dict())
        torch.save(self.optimizer.optimizer.state_dict(), folder / self.files[1])

    def restore(self, checkpoints: CheckpointFolder, step: int) -> None:
        self.network.load_state_dict(checkpoints.load_tensors(step, self.files[0]))
        self.optimizer.optimizer.load_state_dict(checkpoints.load_object(step, self.files[1]))
