"""Weights, gradients and optimiser state split over processes: PyTorch's FSDP2 (`fully_shard`), the same on GPUs (NCCL) and CPUs (gloo).

`accelerate launch` asks for it (`distributed_type: FSDP`, `fsdp_version: 2`) and its options are read as Accelerate's plugin has them; the
rule by which a model is split is here, and each model's own: `_no_split_modules` names the classes of its blocks, every one of which is
gathered when it is called and let go afterwards; the rest belongs to the root. Accelerate's own `transformer_based_wrap` reads the same
attribute, but is not used, because on CPUs Accelerate does not turn FSDP on.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from genvision.errors import UserError

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How weights are split, in the terms of Accelerate's FullyShardedDataParallelPlugin."""

    reshard_after_forward: bool = True
    """Let a block's gathered weights go behind its forward pass, and gather them again for the backward pass."""
    full_checkpoints: bool = False
    """Gather what a checkpoint holds in the main process (FULL_STATE_DICT), instead of a file for each process (SHARDED_STATE_DICT)."""
    cpu_offload: bool = False
    """Keep the split weights in the memory of the CPU between their uses."""


def requested_sharding(accelerator: Accelerator) -> Sharding | None:
    """What `accelerate launch` asks for; None for one process, or where every process holds the whole model.

    Raises:
        UserError: it asks for the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1") or accelerator.num_processes == 1:
        return None
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()  # takes its options from the environment that the launcher made
    if plugin.fsdp_version != 2:
        raise UserError("fsdp_version 1: weights are split by FSDP2 only; set fsdp_version to 2 in the configuration of accelerate")
    return Sharding(
        reshard_after_forward=bool(plugin.reshard_after_forward),
        full_checkpoints="FULL" in str(plugin.state_dict_type),
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    )


def place(model: nn.Module, accelerator: Accelerator, sharding: Sharding | None) -> None:
    """Put a model onto the device, split if that is asked for."""
    model.to(accelerator.device)
    if sharding is not None:
        shard(model, sharding, accelerator)


def shard(model: nn.Module, sharding: Sharding, accelerator: Accelerator) -> None:
    """Split the weights of a model in place, block by block; what `replicated_parameters` names stays whole in every process.

    Raises:
        UserError: some must stay whole where that cannot be.
    """
    if replicated_parameters(model) and (accelerator.mixed_precision == "fp16" or sharding.cpu_offload):
        what = "fsdp_offload_params" if sharding.cpu_offload else "train.precision fp16"
        raise UserError(f"{what}: not all weights of a {type(model).__name__} can be split; train it by DDP, or in bf16 on the GPU")
    low = LOW_PRECISION.get(accelerator.mixed_precision)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        # the loop's autocast decides what runs in low precision; so inputs (times, latents) keep their own
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if sharding.cpu_offload else OffloadPolicy(),
        "ignored_params": set(replicated_parameters(model)),
    }
    for unit in sharding_units(model):
        fully_shard(unit, reshard_after_forward=sharding.reshard_after_forward, **options)
    fully_shard(model, **options)


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The blocks that are split each on its own, outermost only."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in names:
                found.append(child)
            else:
                walk(child)

    walk(model)
    return found


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that stay whole: those below the model's `_replicated_modules`, which are read or written outside a forward pass."""
    parts: tuple[str, ...] = getattr(model, "_replicated_modules", ())
    return [parameter for name, parameter in model.named_parameters() if name.startswith(tuple(f"{part}." for part in parts))]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, in each of them; to be called by all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def forget_gathered(model: nn.Module) -> None:
    """Let gathered weights go, after the split ones were changed by hand: the next forward pass gathers them anew."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
