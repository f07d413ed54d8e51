"""Checkpoints are written in a thread while training goes on; all processes write their own files, the main one finishes the folder."""

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from accelerate import Accelerator
from safetensors import SafetensorError

from genvision.errors import UserError
from genvision.training.peers import lost_contact
from genvision.training.state import CheckpointFolder, describe, sync

Files = dict[str, Callable[[Path], Any]]
"""Name of a file to what writes it, from copies that training does not touch."""
MAX_FAILURES = 3
"""Checkpoints in a row that may fail (a full disk, say) before the run stops."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    What cannot be written is told on stderr and left out; the run goes on with the older ones, and stops when three in a row failed.
    """

    def __init__(self, checkpoints: CheckpointFolder, accelerator: Accelerator) -> None:
        self.checkpoints, self.is_main = checkpoints, accelerator.is_main_process
        # a group of its own, since the thread's messages must not meet those of training
        self.group: Any = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.num_processes = accelerator.num_processes
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.last_failure = ""
        self.error: BaseException | None = None

    def write(self, step: int, files: Files, facts: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of a step, after the one before is done; called by all processes.

        Args:
            files: of this process.
            facts: for state.json; the main process's count.
        """
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, files, facts), name="checkpoint writer", daemon=True)
        self.thread.start()

    def wait(self, *, must_succeed: bool = False) -> None:
        """Until nothing is being written.

        Raises:
            UserError: three checkpoints in a row could not be written; or the last one, where it must.
        """
        self.finish()
        if self.error is not None:
            raise self.error
        if self.failures and (must_succeed or self.failures >= MAX_FAILURES):
            kept = self.checkpoints.steps()
            place = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was written yet"
            raise UserError(f"{self.last_failure}; {place}; make room, then run the same command again")

    def finish(self) -> None:
        """Until nothing is being written, whatever comes of it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, step: int, files: Files, facts: Mapping[str, Any]) -> None:
        try:
            self._write_together(step, files, facts)
        except BaseException as error:
            if not lost_contact(error):  # which training itself will notice and tell
                self.error = error
            self.failures += 1
            self.last_failure = f"{self.checkpoints.path(step)}: the checkpoint was not finished (lost contact with another process)"

    def _write_together(self, step: int, files: Files, facts: Mapping[str, Any]) -> None:
        written: dict[str, Any] = {}
        failure = self._tried(lambda: self.checkpoints.begin(step)) if self.is_main else None
        failures = self._from_all(failure)
        if not any(failures):

            def write_mine() -> None:
                for name, write in files.items():
                    path = self.checkpoints.part(step) / name
                    write(path)
                    sync(path)
                    written[name] = describe(path)

            failures = self._from_all(self._tried(write_mine))
        everywhere = {name: facts for part in self._from_all(written) for name, facts in part.items()}
        if not any(failures) and self.is_main:
            failure = self._tried(lambda: self.checkpoints.finish(step, facts, everywhere))
        failures = [*failures, *self._from_all(failure)]
        self._settle(step, next((why for why in failures if why), None))

    def _settle(self, step: int, failure: str | None) -> None:
        if failure is None:
            self.failures = 0
            return
        self.failures += 1
        self.last_failure = f"{self.checkpoints.path(step)}: the checkpoint cannot be written ({failure})"
        if self.is_main:
            self.checkpoints.abandon(step)
            print(f"{self.last_failure}; older ones are kept, and training goes on", file=sys.stderr, flush=True)

    def _tried(self, action: Callable[[], Any]) -> str | None:
        """Why it failed, if it did."""
        try:
            action()
        except Exception as error:  # whatever it is, the other processes must hear of it
            if not isinstance(error, OSError | SafetensorError):
                self.error = error
            return " ".join(str(error).split()) or type(error).__name__
        return None

    def _from_all(self, mine: Any) -> list[Any]:
        """What each process has."""
        if self.group is None:
            return [mine]
        everyone: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(everyone, mine, group=self.group)
        return everyone
