"""A watch over the phases of a training step: a process that stalls says where, and ends.

Without it a process whose disk or network hangs, and all that wait for it in a collective operation, hold their GPUs until a person looks.
"""

import faulthandler
import os
import threading
import time

from genvision.training.phases import Phases

STALLED = 75
"""Exit status: EX_TEMPFAIL of sysexits.h. The launcher ends the other processes, a scheduler may start the job again."""
SLOW = {"start", "checkpoint", "preview", "validation", "scores"}
"""Phases that come seldom and take long."""
SHARED = {"forward_backward", "agreement", "optimizer", "after_step"}
"""Phases in which a process may wait for the others."""
STDERR = 2


class Watchdog:
    """Ends this process with status 75 when one phase lasts too long; a context manager around the steps.

    It says so in one line on stderr, followed by the Python stacks of all threads. It is a thread, so it does not see what blocks the whole
    interpreter (reading a memory map on a network disk that hangs); those of the other processes, which wait for this one, do.

    Args:
        rank: of this process.
        num_processes: with more than one, those that may only be waiting for another have a little more patience, so that the one that
            holds up the others speaks first.
        timeout: seconds that a phase may last.
        slow_factor: patience with the phases in `SLOW`, in timeouts.
    """

    def __init__(self, phases: Phases, rank: int, num_processes: int, timeout: float, *, slow_factor: float = 10.0) -> None:
        assert timeout > 0
        self.phases, self.rank, self.num_processes, self.timeout, self.slow_factor = phases, rank, num_processes, timeout, slow_factor
        self.interval = min(timeout / 10, 5.0)
        self._phase, self._forgiven, self._looked = ("", 0.0), 0.0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._looked = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            stall = self.look(time.monotonic())
            if stall is not None:
                self._end(*stall)

    def look(self, now: float) -> tuple[str, float] | None:
        """The phase that lasts too long at a time `now` of the monotonic clock, and for how many seconds; None while all is well."""
        phase = (self.phases.current, self.phases.since)
        # The main thread may be between setting the one and the other, so a phase counts when it was there at the last look, too.
        is_known = phase == self._phase
        if not is_known:
            self._phase, self._forgiven = phase, 0.0
        name, since = phase
        if now - self._looked > 3 * self.interval:  # this thread did not run either: the job was stopped, or the machine slept
            self._forgiven += now - max(self._looked, since)
        self._looked = now
        lasted = now - since - self._forgiven
        return (name, lasted) if is_known and lasted > self.patience(name) else None

    def patience(self, phase: str) -> float:
        """Seconds that a phase may last."""
        if phase in SLOW:
            return self.timeout * self.slow_factor
        waits = phase in SHARED and self.num_processes > 1
        return self.timeout + (2 * self.interval if waits else 0.0)

    def _end(self, phase: str, seconds: float) -> None:
        line = (
            f"genvision: rank {self.rank} of {self.num_processes} processes: step {self.phases.step} stalled in phase {phase} "
            f"for {seconds:.0f} s; {self._cause(phase)}; this process ends with status {STALLED}\n"
        )
        os.write(STDERR, line.encode())  # at once and whole, whatever the main thread holds
        faulthandler.dump_traceback(STDERR, all_threads=True)
        os._exit(STALLED)

    def _cause(self, phase: str) -> str:
        if phase == "data":
            return "it waits for its data: look at its workers and at what they read"
        if phase in SHARED and self.num_processes > 1:
            return "it computes, or waits for the other processes: look for the rank that names another phase"
        if phase in SHARED:
            return "it computes"
        return f"it does what belongs to {phase}" + (", or waits for the process that does" if self.num_processes > 1 else "")
