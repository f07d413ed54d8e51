"""Which code runs the kernels: what the user forces by an environment variable, and whether Triton can run at all.

GENVISION_ATTENTION=NAME forces the back end of attention for the whole process. `triton` also takes our other Triton kernels wherever
they can run, and every other name takes none of them.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from genvision.errors import UserError

Backend = Literal["plain", "sdpa", "flash", "efficient", "cudnn", "flex", "triton"]
VARIABLE = "GENVISION_ATTENTION"


def forced_backend() -> Backend | None:
    """What GENVISION_ATTENTION says; None where it is unset or empty.

    The environment is read once per process: reading takes 3 microseconds, and every attention call asks. Who changes the variable later,
    as tests do, calls `read_once.cache_clear()`.

    Raises:
        UserError: the variable holds another name.
    """
    # a cached function would make torch.compile warn; it traces this branch once
    return _from_environment() if torch.compiler.is_compiling() else read_once()


def triton_runs(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device: on CUDA, and with TRITON_INTERPRET=1, slowly, on any."""
    return _interpreted() or (device.type == "cuda" and torch.version.hip is None and _installed())


def fuses(*tensors: Tensor | None) -> bool:
    """Whether those of our Triton kernels that know no backward pass take a call with these tensors.

    They do where Triton runs and nobody asks for gradients: on CUDA unless another back end is forced, elsewhere only if forced. Within
    torch.compile they leave the work to inductor, which fuses the plain form by itself; under autocast the plain form decides what runs
    in which precision.
    """
    first, forced = tensors[0], forced_backend()
    assert first is not None
    if torch.compiler.is_compiling() or first.dtype == torch.float64:  # the kernels compute in float32
        return False
    if forced != "triton" and (forced is not None or not first.is_cuda):
        return False
    return triton_runs(first.device) and not under_autocast(first.device) and not needs_gradient(*tensors)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses the precision of operations on this device; on some, such as meta, there is none to ask about."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def read_once() -> Backend | None:
    """`forced_backend` outside torch.compile."""
    return _from_environment()


def _from_environment() -> Backend | None:
    name = os.environ.get(VARIABLE, "")
    for backend in get_args(Backend):
        if name == backend:
            return backend
    if name:
        raise UserError(f"{VARIABLE} '{name}' is unknown; choose one of {', '.join(get_args(Backend))}, or unset it")
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
