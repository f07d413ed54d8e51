"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step_0000100/`: `model.safetensors`, `ema_DECAY.safetensors`, `optimizer.pt`, `stage.pt`, one
`rng_RANK.pt` a process, and `state.json` with the step, counters and the size of every file. It is written under another
name, synced and renamed; so a folder of that name was finished.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genvision.errors import UserError

PART = ".part"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        root: their folder.
        keep: how many of the newest stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, rising."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.root.glob("step_*") if not path.name.endswith(PART))

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """A new empty folder to write into; left-overs of interrupted writes are removed."""
        for leftover in self.root.glob(f"step_*{PART}"):
            shutil.rmtree(leftover)
        part = self.part(step)
        part.mkdir(parents=True)
        return part

    def part(self, step: int) -> Path:
        return self.root / f"step_{step:08d}{PART}"

    def finish(self, part: Path, facts: Mapping[str, Any]) -> None:
        """Record what was written, sync it, give it its name, and remove the oldest beyond `keep`."""
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        (part / "state.json").write_text(json.dumps({**facts, "files": files}, indent=2))
        for path in [*part.iterdir(), part]:
            sync(path)
        final = part.with_name(part.name.removesuffix(PART))
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        sync(self.root)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step))

    def read(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint, after a check that every file has the size it was written with.

        Raises:
            UserError: it is damaged.
        """
        folder = self.path(step)
        try:
            facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
            files: dict[str, int] = facts["files"]
        except (OSError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise self._damaged(folder / "state.json", "it cannot be read") from error
        for name, size in files.items():
            path = folder / name
            if not path.is_file():
                raise self._damaged(path, "it is missing")
            if path.stat().st_size != size:
                raise self._damaged(path, f"it has {path.stat().st_size} bytes, {size} were written")
        return facts

    def load_tensors(self, step: int, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path(step) / name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(self.path(step) / name, str(error)) from error

    def load_object(self, step: int, name: str) -> Any:
        try:
            return torch.load(self.path(step) / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            raise self._damaged(self.path(step) / name, str(error).splitlines()[0]) from error

    def _damaged(self, path: Path, why: str) -> UserError:
        return UserError(f"{path}: the checkpoint is damaged ({why}); delete {path.parent} to resume from the one before")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    part.write_text(text)
    sync(part)
    part.replace(path)
