"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step_00000100/`: weights, optimisers and averages as safetensors (see genvision.training.saved_tensors),
`stage.pt`, one `rng_RANK.pt` a process, and `state.json` with the step, counters, and size and sha256 of every file. It is written under
another name, synced and renamed; so a folder of that name was finished.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from genvision.errors import UserError

PART, OLD, DAMAGED = ".part", ".old", ".damaged"
FORMAT = 3
BLOCK = 1 << 20


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: the checkpoint is damaged ({why})")


class FoundCheckpoint(NamedTuple):
    """One that a run can go on from."""

    step: int
    facts: dict[str, Any]
    """What state.json holds."""


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
        names = [path.name.removeprefix("step_") for path in self.root.glob("step_*")]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def part(self, step: int) -> Path:
        """Where a checkpoint is written until it is whole."""
        return self.root / f"step_{step:08d}{PART}"

    def begin(self, step: int) -> Path:
        """A new empty folder to write into; left-overs of interrupted writes are removed."""
        for leftover in [*self.root.glob(f"step_*{PART}"), *self.root.glob(f"step_*{OLD}")]:
            shutil.rmtree(leftover)
        part = self.part(step)
        part.mkdir(parents=True)
        return part

    def abandon(self, step: int) -> None:
        """Remove what was written of a checkpoint that cannot be finished."""
        shutil.rmtree(self.part(step), ignore_errors=True)

    def finish(self, step: int, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Record what was written, give the folder its name, and remove the oldest beyond `keep`.

        Args:
            files: of every file what `describe` says; they are synced already.
        """
        part, final = self.part(step), self.path(step)
        with (part / "state.json").open("w") as file:
            json.dump({"format": FORMAT, "step": step, **facts, "files": dict(sorted(files.items()))}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        sync(part)
        if final.exists():  # of a run that was wound back
            self._put_away(step)
        part.rename(final)
        sync(self.root)
        for too_old in self.steps()[: -self.keep]:
            self._put_away(too_old)
        for old in self.root.glob(f"step_*{OLD}"):
            shutil.rmtree(old, ignore_errors=True)

    def _put_away(self, step: int) -> None:
        """Take its name from a checkpoint, or a kill in the midst of its removal would leave half of one."""
        self.path(step).rename(self.path(step).with_name(self.path(step).name + OLD))

    def forget_after(self, step: int) -> None:
        """Take away the checkpoints of later steps, of a run that was wound back."""
        for later in reversed([found for found in self.steps() if found > step]):
            self._put_away(later)

    def newest(self, at_most: int | None = None) -> FoundCheckpoint | None:
        """The newest whole checkpoint, of a step up to `at_most` where it is given; damaged newer ones are set aside, and told on stderr.

        Raises:
            UserError: there are some, but every one is damaged, or of another format.
        """
        steps = [step for step in reversed(self.steps()) if at_most is None or step <= at_most]
        for step in steps:
            try:
                return FoundCheckpoint(step, self.read(step))
            except DamagedCheckpoint as error:
                aside = self.path(step).with_name(self.path(step).name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)
                print(f"{error}; it is set aside as {aside.name}, and the one before is taken", file=sys.stderr, flush=True)
        if steps or (at_most is None and any(self.root.glob(f"step_*{DAMAGED}"))):
            raise UserError(
                f"{self.root}: none of its checkpoints can be read; restore one, or delete the folder of the run to start again from step 0"
            )
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint, after a check that every file is what was written.

        Raises:
            DamagedCheckpoint: it is not.
            UserError: it is whole, but of another format.
        """
        folder = self.path(step)
        try:
            facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
            version, files = facts["format"], facts["files"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise DamagedCheckpoint(folder / "state.json", "it cannot be read") from error
        except OSError as error:
            raise _unreadable(folder / "state.json", error) from error
        if version != FORMAT:
            raise UserError(f"{folder}: is a checkpoint in format {version}, this genvision writes and reads {FORMAT}; train again")
        for name, wanted in files.items():
            path = folder / name
            if not path.is_file():
                raise DamagedCheckpoint(path, "it is missing")
            if path.stat().st_size != wanted["size"]:
                raise DamagedCheckpoint(path, f"it has {path.stat().st_size} bytes, {wanted['size']} were written")
            try:
                found = describe(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            if found != wanted:
                raise DamagedCheckpoint(path, "its bytes are not those that were written")
        return facts

    def load_object(self, step: int, name: str) -> Any:
        """What `torch.save` wrote: tensors and plain values, no code."""
        try:
            return torch.load(self.path(step) / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            raise DamagedCheckpoint(self.path(step) / name, str(error).splitlines()[0]) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    """A failing disk or network is no damage: nothing is set aside for it."""
    return UserError(f"{path}: cannot be read ({error.strerror}); check the disk or network, then run again")


def describe(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


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
