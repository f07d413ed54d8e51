"""Reading weight files safely, and filling a module with a complete report of what does not fit."""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from genvision.errors import UserError

CONTAINERS = ("model", "ema", "module", "state_dict", "model_state_dict")
"""Keys under which official files keep their weights; a file without them is a bare state dict."""


def read_state_dict(path: str | Path, weights: str | None = None, *, prefer: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """Tensors of a `.pt`, `.pth`, `.ckpt` or `.safetensors` file; nothing in the file is executed.

    Args:
        path: the file.
        weights: which container to take from a training checkpoint (`model`, `ema`, ...); None takes the first there is of `prefer`.
        prefer: names of containers.

    Raises:
        UserError: the file is missing or damaged, holds more than data, or lacks the container.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the downloaded checkpoint")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            # official trainers store their argparse.Namespace beside the weights; it is plain data
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable weight file (damaged, or it holds more than tensors): {reason}") from error
    return _unwrap(content, weights, prefer, path)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _unwrap(content: Any, weights: str | None, prefer: Sequence[str], path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict or a checkpoint with one")
    present = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
    if weights is not None and weights not in present:
        raise UserError(f"{path}: has no '{weights}' weights; it holds {', '.join(present) or 'a bare state dict'}")
    if present:
        content = content[weights or next(name for name in (*prefer, *present) if name in present)]
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return state


def fill(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights strictly; every missing, unexpected and mis-shaped tensor is named in one error."""
    wanted = module.state_dict()
    problems = [f"missing {name} {_shape(tensor)}" for name, tensor in wanted.items() if name not in state_dict]
    problems += [f"unexpected {name} {_shape(tensor)}" for name, tensor in state_dict.items() if name not in wanted]
    problems += [
        f"{name} is {_shape(state_dict[name])}, expected {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if problems:
        raise UserError(f"{source}: {len(problems)} tensors do not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict(dict(state_dict), assign=any(p.is_meta for p in module.parameters()))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
