"""Files of JSON objects, one a line, that a full disk does not harm: each object has the `step` of the run at which it was written."""

import json
import math
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

MAX_WAITING = 10_000
"""Lines kept for a disk that takes none."""


class JsonLines:
    """A file of JSON objects, one a line. A write that fails is undone and tried again with the next line; it ends no training.

    Args:
        step: lines of later ones are removed.
    """

    def __init__(self, path: Path, step: float = math.inf) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque()
        self.num_lost = 0
        self.is_failing = False
        self.size = 0
        """Bytes of whole lines in the file; what stands behind them is cut off by the next write."""
        self.cut(step)

    def append(self, content: dict[str, Any]) -> None:
        self.waiting.append(json.dumps(_finite(content)).encode() + b"\n")
        if len(self.waiting) > MAX_WAITING:
            self.waiting.popleft()
            self.num_lost += 1
        self._flush()

    def later(self, step: float) -> list[dict[str, Any]]:
        """What was written of later steps."""
        _, later, waiting = self._read(step)
        return later + [json.loads(line) for line in self.waiting if line not in waiting]

    def cut(self, step: float) -> None:
        """Remove what was written of later steps, and half a line at the end, left by a killed run."""
        self.size, _, self.waiting = self._read(step)
        self._flush()

    def _read(self, step: float) -> tuple[int, list[dict[str, Any]], deque[bytes]]:
        """Bytes of the file up to that step, objects of later steps behind them, and waiting lines up to that step."""
        size = end = 0
        later: list[dict[str, Any]] = []
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    end += len(line)
                    content = parsed_line(line)
                    if content is not None and (later or content["step"] > step):
                        later.append(content)
                    elif content is not None:
                        size = end
        return size, later, deque(line for line in self.waiting if json.loads(line)["step"] <= step)

    def close(self) -> None:
        self._flush()
        lost = self.num_lost + len(self.waiting)
        if lost:
            print(f"warning: {self.path}: {lost} lines could not be written and are lost", file=sys.stderr, flush=True)

    def _flush(self) -> None:
        try:
            if not self.waiting and not (self.path.exists() and self.path.stat().st_size > self.size):
                return
            with self.path.open("ab", buffering=0) as file:
                if file.tell() > self.size:
                    file.truncate(self.size)
                    file.seek(0, os.SEEK_END)
                content = memoryview(b"".join(self.waiting))
                while content:
                    content = content[file.write(content) :]
                self.size = file.tell()
        except OSError as error:
            if not self.is_failing:
                why = f"cannot be written ({error.strerror}); lines are kept in memory until it can"
                print(f"warning: {self.path}: {why}", file=sys.stderr, flush=True)
            self.is_failing = True
        else:
            self.waiting.clear()
            self.is_failing = False


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line that was written whole, with its `step`; None of any other."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int | float) else None


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in content.items()}
