"""What a run says about itself: means over the steps since the last line, to metrics.jsonl, the tracker and the screen."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genvision.progress import Progress


class MetricLog:
    """Collects terms of every step; writes one line every `every` steps.

    Args:
        path: the .jsonl file.
        accelerator: reduces over processes, and passes lines on to a tracker.
        start_step: lines of later steps, left by an interrupted run, are removed.
        baselines: values to read terms against (`loss` of guessing, say), shown beside them.
    """

    def __init__(self, path: Path, accelerator: Any, *, start_step: int, num_steps: int, baselines: dict[str, float], every: int) -> None:
        self.path, self.accelerator, self.baselines, self.every = path, accelerator, baselines, every
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # a term may be there in some steps only
        self.samples = 0
        self.began = time.monotonic()
        self.progress = Progress(num_steps, "training", start=start_step, unit="steps", show=accelerator.is_main_process)
        if accelerator.is_main_process:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= start_step]
            path.write_text("".join(line + "\n" for line in kept))

    def add(self, terms: dict[str, Tensor], samples: int) -> None:
        """Terms of one step of this process, and samples of all processes."""
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.samples += samples

    def step_done(self, step: int, extra: dict[str, float]) -> None:
        """`step` steps are done; writes a line when it is time."""
        if step % self.every == 0 and self.counts:
            self._write(step, extra)
        self.progress.advance()

    def close(self) -> None:
        self.progress.close()

    def _write(self, step: int, extra: dict[str, float]) -> None:
        names = sorted(self.sums)
        means = self.accelerator.reduce(torch.stack([self.sums[name] / self.counts[name] for name in names]), "mean").tolist()
        elapsed = time.monotonic() - self.began
        values = dict(zip(names, means, strict=True)) | extra | {"images_per_second": self.samples / max(elapsed, 1e-9)}
        values |= {f"{name}_baseline": value for name, value in self.baselines.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            loss = f"loss {values['loss']:.4f}"
            if "loss" in self.baselines:
                loss += f" (guessing {self.baselines['loss']:.4f})"
            self.progress.note = f"{loss}, {values['images_per_second']:.0f} images/s"
        self.accelerator.log(values, step=step)
        self.sums, self.counts, self.samples, self.began = {}, {}, 0, time.monotonic()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a kill
