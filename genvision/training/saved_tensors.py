"""Named tensors of a checkpoint: in one file, or in a file for each process that holds a part of each (FSDP2).

`model.safetensors` holds whole tensors. `model.00001-of-00004.safetensors` holds the rows that process 1 of 4 has; its metadata names
the first row and the whole shape of each tensor. Either is read by any number of processes, each taking the rows that it needs.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from genvision.errors import UserError
from genvision.training.sharding import local, whole
from genvision.training.state import DamagedCheckpoint, save_tensors
from genvision.training.writer import Files

PLACES = "places"


def saved_files(name: str, tensors: Mapping[str, Tensor], rank: int, world_size: int, *, gather: bool) -> Files:
    """What this process writes of `tensors`: a copy of it is made now, so that training may go on.

    Args:
        tensors: the same names in every process; whole in all, or split (DTensor).
        gather: split tensors are gathered for one file; all processes must call.
    """
    split = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if not split or gather:
        copies = {}
        for key, tensor in tensors.items():
            gathered = whole(tensor)  # by all processes
            if rank == 0:
                copies[key] = _copy(gathered)
        return {f"{name}.safetensors": partial(save_tensors, tensors=copies)} if rank == 0 else {}
    mine = {key: tensor for key, tensor in tensors.items() if key in split or rank == 0}
    places = {key: [rows_of(tensor)[0], list(tensor.shape)] for key, tensor in mine.items()}
    copies = {key: _copy(local(tensor)) for key, tensor in mine.items()}
    return {
        f"{name}.{rank:05d}-of-{world_size:05d}.safetensors": partial(save_tensors, tensors=copies, metadata={PLACES: json.dumps(places)})
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """First row and end of what this process holds of a tensor: all of it, or one of the parts that `torch.chunk` makes."""
    num = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return 0, num
    size = -(-num // tensor.device_mesh.size())
    first = min(size * tensor.device_mesh.get_local_rank(), num)
    return first, min(first + size, num)


class SavedTensors:
    """The tensors of one name in a checkpoint's folder.

    Raises:
        DamagedCheckpoint: a file is missing or cannot be read; here, or when it is read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.safetensors"
        paths = [self.path] if self.path.is_file() else sorted(folder.glob(f"{name}.*-of-*.safetensors"))
        if not paths:
            raise DamagedCheckpoint(self.path, "it is missing")
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
                places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
                for key in file.keys():  # noqa: SIM118 - a safe_open object is no mapping
                    shape = file.get_slice(key).get_shape()
                    first, whole_shape = places.get(key, (0, shape))
                    self._parts.setdefault(key, []).append((first, file))
                    self.shapes[key] = tuple(whole_shape)
            except (SafetensorError, OSError, ValueError) as error:
                raise DamagedCheckpoint(path, " ".join(str(error).split())) from error

    def rows(self, key: str, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of a tensor."""
        pieces = []
        for start, file in sorted(self._parts[key], key=lambda part: part[0]):
            stored = file.get_slice(key)
            if not stored.get_shape():  # one value
                scalar: Tensor = file.get_tensor(key)
                return scalar
            low, high = max(first - start, 0), min(end - start, stored.get_shape()[0])
            if low < high:
                pieces.append(stored[low:high])
        return torch.cat(pieces) if pieces else self._empty(key)

    def _empty(self, key: str) -> Tensor:
        first: Tensor = self._parts[key][0][1].get_slice(key)[:0]
        return first

    @torch.no_grad()
    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, whole or split.

        Raises:
            UserError: there are others here, or of other shapes.
        """
        if tensors.keys() != self.shapes.keys():
            differing = sorted(tensors.keys() ^ self.shapes.keys())
            raise UserError(f"{self.path}: holds other tensors than the model has ({', '.join(differing[:3])}); give the old options")
        for key, tensor in tensors.items():
            if self.shapes[key] != tuple(tensor.shape):
                raise UserError(f"{self.path}: {key} is {list(self.shapes[key])}, the model has {list(tensor.shape)}; give the old options")
            local(tensor).copy_(self.rows(key, *rows_of(tensor)))
