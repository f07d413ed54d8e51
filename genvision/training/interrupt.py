"""Signals that ask a run to stop."""

import signal
from types import FrameType


class Interrupt:
    """Notes SIGTERM, SIGUSR1 (a scheduler that wants its machine back) and the first SIGINT, so that the loop can end between two steps.

    A second SIGINT acts as usual.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
        self.old = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
