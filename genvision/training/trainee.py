"""A network in training: its weights, its optimiser and its learning rate; the model itself, and an adversary where there is one."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genvision.training.config import OptimConfig
from genvision.training.optim import learning_rate, make_optimizer
from genvision.training.saved_tensors import SavedTensors, rows_of, saved_files
from genvision.training.sharding import Sharding, forget_gathered, local, place, replicated_parameters, whole
from genvision.training.writer import Files

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainee:
    """One network and what trains it.

    Args:
        network: what is trained; its optimiser sees the parameters that require gradients now.
        config: of the optimiser.
        num_steps: of the run.
        names: in a checkpoint, of its weights and of its optimiser's state.
        sharding: how its weights are split over processes; None leaves it whole in each.
        wrap: where it is whole, let Accelerate wrap it (DDP averages gradients in its backward pass). A network that is called several
            times in one step must not be wrapped; `average_gradients` serves it.

    Attributes:
        model: what is called in training.
    """

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        num_steps: int,
        accelerator: Accelerator,
        *,
        names: tuple[str, str],
        sharding: Sharding | None = None,
        wrap: bool = True,
    ) -> None:
        self.network, self.config, self.num_steps, self.accelerator, self.names = network, config, num_steps, accelerator, names
        self.sharding = sharding
        network.train()
        place(network, accelerator, sharding)
        self.model: nn.Module = accelerator.prepare_model(network) if wrap and sharding is None else network
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(network, config))
        alone = replicated_parameters(network) if sharding is not None else [] if wrap else [*network.parameters()]
        self._averaged_by_hand = [parameter for parameter in alone if parameter.requires_grad]

    def set_learning_rate(self, step: int) -> float:
        """The rate of this step, which is also set."""
        lr = learning_rate(self.config, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def share_buffers(self) -> None:
        """Give every process the main one's running statistics, as DDP does before each forward pass."""
        if self.sharding is not None and (buffers := [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]):
            for buffer in buffers:
                torch.distributed.broadcast(buffer, 0)

    def average_gradients(self) -> None:
        """Mean over processes, of the parameters whose gradients nothing else averages."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self._averaged_by_hand if p.grad is not None]
        if not gradients:
            return
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def clip_gradients(self) -> float:
        """Norm of the gradients, before they are clipped if they are."""
        # not accelerator.clip_grad_norm_, which would unscale the gradients of every network at once, and fail at the second
        self.accelerator.unscale_gradients(self.optimizer)
        return clip_gradients([*self.network.parameters()], self.config.max_grad_norm)

    def files(self) -> Files:
        """What this process writes of weights and optimiser into a checkpoint."""
        weights, optimizer = self.names
        return self._saved(weights, self.network.state_dict()) | self._saved(optimizer, self._optimizer_tensors(lambda _, value: value))

    def _saved(self, name: str, tensors: dict[str, Tensor]) -> Files:
        accelerator, gather = self.accelerator, self.sharding is not None and self.sharding.full_checkpoints
        return saved_files(name, tensors, accelerator.process_index, accelerator.num_processes, gather=gather)

    def _optimizer_tensors(self, of: Callable[[nn.Parameter, Tensor], Tensor]) -> dict[str, Tensor]:
        """The optimiser's state by names: exp_avg.NAME, exp_avg_sq.NAME and step.NAME of every parameter that was ever trained."""
        state, found = self.optimizer.optimizer.state, {}
        for name, parameter in self.network.named_parameters():
            for key, value in state.get(parameter, {}).items():
                found[f"{key}.{name}"] = of(parameter, value)
        return found

    def restore(self, folder: Path) -> None:
        """Weights and optimiser from a checkpoint's folder.

        Raises:
            DamagedCheckpoint: it holds other tensors.
        """
        SavedTensors(folder, self.names[0]).load_into(self.network.state_dict())
        forget_gathered(self.network)
        saved = SavedTensors(folder, self.names[1])
        state = self.optimizer.optimizer.state
        state.clear()
        fused = any(group.get("fused") for group in self.optimizer.optimizer.param_groups)
        for name, parameter in self.network.named_parameters():
            if f"step.{name}" not in saved.shapes:
                continue
            step = saved.rows(f"step.{name}", 0, 1).to(parameter.device if fused else "cpu")
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            for key, moment in moments.items():
                local(moment).copy_(saved.rows(f"{key}.{name}", *rows_of(moment)))
            state[parameter] = {"step": step, **moments}


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients down to a norm over all of them, those that are split and those that are whole; gives the norm they had.

    Args:
        max_norm: None leaves them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    split = [g for g in gradients if isinstance(g, DTensor)]
    if not split:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm) if max_norm else nn.utils.get_total_norm(gradients))
    norms = [whole(nn.utils.get_total_norm(part)) for part in (split, [g for g in gradients if not isinstance(g, DTensor)]) if part]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does
        torch._foreach_mul_([local(g) for g in gradients], factor)
    return float(total)
