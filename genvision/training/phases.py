"""Where a process is in its step: what the watchdog names, and what the log accounts for."""

import time


class Phases:
    """The phase that a process is in, and the seconds spent in each since they were last asked for.

    Phases of the loop: `data` (waiting for the next batch), `forward_backward`, `agreement` (a reduction over processes, one a step),
    `optimizer`, `after_step`, `checkpoint`, `preview`, `validation`, `scores`.
    """

    def __init__(self) -> None:
        self.current, self.step = "start", 0
        self.since = time.monotonic()
        """When the current phase began."""
        self._seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """The process goes on to another phase."""
        now = time.monotonic()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = name, now

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        self.enter(self.current)
        seconds, self._seconds = self._seconds, {}
        return seconds
