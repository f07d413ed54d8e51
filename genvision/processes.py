"""The processes of a job and where they compute: how many there are, which of them this is, on which device."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from genvision.errors import UserError

T = TypeVar("T")


def process_state(device: str | torch.device | None = None) -> PartialState:
    """Accelerate's state of this process; the first call of a job decides how its processes talk to each other.

    Left to itself, Accelerate takes every process of `torchrun` on a machine without accelerator for the only one.

    Args:
        device: where the job computes; the best there is unless told.
    """
    accelerated = torch.accelerator.is_available() if device is None else torch.device(device).type != "cpu"
    return PartialState(cpu=not accelerated)


def choose_device(name: str | None) -> str:
    """The device of that name, or the best there is.

    Raises:
        UserError: there is none of that name.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used ({' '.join(str(error).split())[:120]}); try cpu") from error
    return name


def fit_threads() -> None:
    """Let torch use the cores that this process may use, shared with the other processes of a job on this machine.

    Torch counts the cores of the machine; where a container may use fewer, threads wait for each other, and small products become several
    times slower. OMP_NUM_THREADS, if it is set, stays in force.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores() // neighbours)))


def available_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those that it is bound to, and no more than a container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def from_main(function: Callable[[], T]) -> T:
    """What the main process gets of a function, in every process; a UserError that it raises is raised in every one."""
    state = process_state()
    if state.num_processes == 1:
        return function()
    answer: list[T | UserError | None] = [None]
    if state.is_main_process:
        try:
            answer = [function()]
        except UserError as error:
            answer = [UserError(str(error))]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]
