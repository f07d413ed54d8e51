"""Progress of long work: a bar on a terminal, plain lines when piped."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10.0


class Progress:
    """Counts `unit`s of work towards `total`; shows rate and time left."""

    def __init__(self, total: int, description: str, *, start: int = 0, unit: str = "images", show: bool = True) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.start, self.count = start, start
        self.show = show
        self.note = ""
        self.began = self.last_line = time.monotonic()
        self.bar = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=description, unit=f" {unit}", dynamic_ncols=True)

    def advance(self, by: int = 1, note: str = "") -> None:
        """Count `by` more units; `note` is shown behind the rate (a loss, say)."""
        self.count += by
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(by)
        elif self.show and (time.monotonic() - self.last_line >= LINE_SECONDS or self.count >= self.total):
            self._line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.count - self.start) / max(self.last_line - self.began, 1e-9)
        left = (self.total - self.count) / max(rate, 1e-9)
        parts = [f"{self.description}: {self.count}/{self.total} {self.unit}", f"{rate:.1f} {self.unit}/s"]
        if self.count < self.total:
            parts.append(f"{left:.0f} s left")
        if self.note:
            parts.append(self.note)
        print(", ".join(parts), file=sys.stderr, flush=True)


def track(items: Iterable[T], total: int, description: str, *, unit: str = "images", show: bool = True) -> Iterator[T]:
    """Yield `items` unchanged while their progress is shown."""
    progress = Progress(total, description, unit=unit, show=show)
    for item in items:
        yield item
        progress.advance()
    progress.close()
