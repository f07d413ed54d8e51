"""What a run says about itself: metrics.jsonl, events.jsonl, the trackers of Accelerate and the line on the screen.

metrics.jsonl gets one JSON object a line every `log_every` steps. Its fields, over the steps since the line before:

    step                    steps done
    loss, ...               terms of the loss: means over steps and processes; NAME_baseline is a value to read a term against
    grad_norm, _max         mean and maximum over the steps in which it was finite; the same of adversary_grad_norm
    lr                      learning rate of the last step
    skipped_steps           of the whole run, for a loss or gradient that was not finite
    images_per_second       of all processes, while they train: checkpoints, previews, validation and scores do not count
    data_wait               part of that time spent waiting for a batch, 0 to 1, of the process that waits longest
    step_seconds_p50, _p90, _p99, _max    percentiles of the time of a step
    memory_gb               10^9 bytes, of the process that has most: on CUDA the peak of what was allocated, else what is resident now
    mfu                     model FLOPs utilisation, 0 to 1, where the device's peak is known (see throughput.py)
    checkpoint_seconds, preview_seconds, validation_seconds, scores_seconds    where there was any

Validation and scores have lines of their own, with `step` and their values (`validation_loss`, `online_fid`). What is not finite is null.

events.jsonl says what befell the run, an object a line with `event`, `step` and `time`: a `rewind` has the step that the run went back to,
and the lines of metrics.jsonl that were taken out for it.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genvision.progress import Progress
from genvision.training.json_lines import JsonLines
from genvision.training.phases import Phases
from genvision.training.throughput import mfu, peak_flops

NORMS = ("grad_norm", "adversary_grad_norm")
"""Values of a step whose mean and maximum are told; of others, the last."""
BETWEEN_STEPS = ("checkpoint", "preview", "validation", "scores")
"""Phases that are no part of a step."""
NOTABLE_WAIT = 0.05
"""Part of the time spent waiting for data from which on the screen tells it."""


class MetricLog:
    """Collects what every step says; writes one line every `every` steps.

    Args:
        path: the .jsonl file; events.jsonl stands beside it.
        accelerator: gathers over processes, and passes lines on to trackers.
        phases: accounts for the time of this process; nothing else may take it.
        start_step: lines of later steps, left by a run that was killed, are removed.
        baselines: values to read terms against (`loss` of guessing, say), shown beside them.
        flops_per_sample: of forward and backward pass, for the utilisation of GPUs.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Any,
        phases: Phases,
        *,
        start_step: int,
        num_steps: int,
        baselines: dict[str, float],
        every: int,
        flops_per_sample: float | None = None,
    ) -> None:
        self.accelerator, self.phases, self.baselines, self.every = accelerator, phases, baselines, every
        self.step, self.flops_per_sample = start_step, flops_per_sample
        self.peak_flops = peak_flops(accelerator.device, accelerator.mixed_precision) if flops_per_sample is not None else None
        self.progress = Progress(num_steps, "training", start=start_step, unit="steps", show=accelerator.is_main_process)
        self.tracker_failed = False
        self.lines: JsonLines | None = None
        self.events: JsonLines | None = None
        if accelerator.is_main_process:
            self.lines, self.events = JsonLines(path, start_step), JsonLines(path.with_name("events.jsonl"))
        self._forget()

    def add(self, terms: dict[str, Tensor], samples: int) -> None:
        """Terms of one step of this process, and samples of all processes."""
        for name in terms:
            if name not in self.sums:
                self.sums[name], self.counts[name] = torch.zeros((), device=self.accelerator.device), 0
            self.counts[name] += 1
        torch._foreach_add_([self.sums[name] for name in terms], [value.detach() for value in terms.values()])  # one kernel for all
        self.samples += samples

    def step_done(self, step: int, extra: dict[str, float]) -> None:
        """`step` steps are done; writes a line when it is time. Called by all processes, right behind the step."""
        self.step = step
        duration = 0.0
        for name, seconds in self.phases.take().items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if name not in BETWEEN_STEPS:
                duration += seconds
        self.durations.append(duration)
        for name in NORMS:
            if math.isfinite(extra.get(name, math.inf)):
                self.norms[name].append(extra[name])
        if step % self.every == 0:
            values = self._values(extra)
            self._write(values)
            self.progress.note = self._note(values)
            self._forget()
        self.progress.advance()

    def record(self, values: Mapping[str, float]) -> None:
        """A line of its own at the newest step, for what is measured now and then; called by all processes with the same values."""
        self._write(values)

    def event(self, kind: str, **facts: Any) -> None:
        """A line in events.jsonl."""
        if self.events is not None:
            self.events.append({"event": kind, "step": self.step, "time": round(time.time(), 3), **facts})

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: lines of later ones move to events.jsonl. Called by all processes."""
        if self.lines is not None:
            self.event("rewind", to=step, lines=self.lines.later(step))  # written before they are taken out
            self.lines.cut(step)
        self.progress.advance(step - self.step)
        self.step = step
        self._forget()

    def close(self) -> None:
        self.progress.close()
        for file in (self.lines, self.events):
            if file is not None:
                file.close()

    def _forget(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # a term may be there in some steps only
        self.samples = 0
        self.seconds: dict[str, float] = {}
        self.durations: list[float] = []
        self.norms: dict[str, list[float]] = {name: [] for name in NORMS}
        self.phases.take()
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)

    def _values(self, extra: dict[str, float]) -> dict[str, float]:
        names, trained = sorted(self.sums), max(sum(self.durations), 1e-9)
        facts = [self.seconds.get("data", 0.0) / trained, self._memory_gb()]
        *means, data_wait, memory_gb = self._everywhere([self.sums[name] / self.counts[name] for name in names], facts)
        rate = self.samples / trained
        line = dict(zip(names, means, strict=True)) | {name: value for name, value in extra.items() if name not in NORMS}
        for name, norms in self.norms.items():
            if norms:
                line |= {name: sum(norms) / len(norms), f"{name}_max": max(norms)}
        line |= {"images_per_second": rate, "data_wait": data_wait}
        percentiles = np.percentile(self.durations, (50, 90, 99, 100))
        line |= dict(zip([f"step_seconds_{name}" for name in ("p50", "p90", "p99", "max")], percentiles.tolist(), strict=True))
        line["memory_gb"] = memory_gb
        if self.flops_per_sample is not None and self.peak_flops is not None:
            line["mfu"] = mfu(self.flops_per_sample * rate, self.peak_flops, self.accelerator.num_processes)
        line |= {f"{name}_seconds": self.seconds[name] for name in BETWEEN_STEPS if name in self.seconds}
        return line | {f"{name}_baseline": value for name, value in self.baselines.items()}

    def _everywhere(self, terms: list[Tensor], facts: list[float]) -> list[float]:
        """Means of terms and maxima of facts over all processes, in one exchange."""
        mine = torch.stack([*terms, *torch.tensor(facts, device=self.accelerator.device)])
        rows = self.accelerator.gather(mine).view(self.accelerator.num_processes, -1)
        both: list[float] = torch.cat([rows[:, : len(terms)].mean(0), rows[:, len(terms) :].amax(0)]).tolist()
        return both

    def _memory_gb(self) -> float:
        device = self.accelerator.device
        return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()) / 1e9

    def _write(self, values: Mapping[str, float]) -> None:
        if self.lines is not None:
            self.lines.append({"step": self.step, **values})
        try:
            self.accelerator.log(dict(values), step=self.step)
        except OSError as error:  # a tracker that writes to a full disk
            if not self.tracker_failed:
                print(f"warning: train.tracker: misses lines from step {self.step} on ({error})", file=sys.stderr, flush=True)
            self.tracker_failed = True

    def _note(self, values: Mapping[str, float]) -> str:
        parts = [f"{values['images_per_second']:.0f} images/s"]
        if "loss" in values:
            guessing = f" (guessing {self.baselines['loss']:.4f})" if "loss" in self.baselines else ""
            parts.insert(0, f"loss {values['loss']:.4f}{guessing}")
        if values["data_wait"] > NOTABLE_WAIT:
            parts.append(f"{100 * values['data_wait']:.0f} % waiting for data")
        if values.get("skipped_steps"):
            parts.append(f"{values['skipped_steps']:.0f} steps skipped")
        if "mfu" in values:
            parts.append(f"MFU {100 * values['mfu']:.1f} %")
        return ", ".join(parts)


def resident_bytes() -> int:
    """Memory of this process on the CPU, now; the most that it ever was where the system does not say."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
