"""`genvision sweep`: one score for each setting of the sampler, as a table and a curve, and the best setting with its interval.

Each setting is a `genvision fid` job in a folder of its own, so a killed sweep goes on where it was, a denser or a longer one reuses every
image that is there, and the best setting can be continued to 50,000 images with `genvision fid --out FOLDER`.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from genvision.errors import UserError
from genvision.eval.job import EvaluationOptions
from genvision.eval.page import write_sweep_page
from genvision.eval.result import EvaluationResult
from genvision.jobs.fid import SampledSet, fid, plan_sampled
from genvision.jobs.sample import open_job
from genvision.processes import process_state
from genvision.training.state import write_atomically

MAX_SETTINGS = 200
COLUMNS = (("fid", "FID"), ("sfid", "sFID"), ("inception_score", "IS"), ("precision", "precision"), ("recall", "recall"))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Scores of all settings, in the order in which they were run."""

    settings: list[dict[str, float]]
    """Sampler option to value."""
    results: list[EvaluationResult]

    @property
    def best(self) -> int:
        """Index of the setting of lowest FID."""
        return min(range(len(self.results)), key=lambda i: _fid(self.results[i]))

    @property
    def ties(self) -> list[int]:
        """The other settings whose interval reaches into that of the best."""
        best = self.results[self.best]
        if best.fid_interval is None:
            return []
        upper = best.fid_interval[1]
        return [i for i, r in enumerate(self.results) if i != self.best and r.fid_interval is not None and r.fid_interval[0] <= upper]


def parse_values(text: str, option: str) -> list[float]:
    """`1.25:2.5:0.25` (first, last, step; both ends included), `1,1.5,2` or one number.

    Raises:
        UserError: the text is neither.
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part) for part in text.split(":"))
            count = int((last - first) / step) if step > 0 else -1
            if count < 0:
                raise UserError(f"--{option} {text}: the step must be above 0 and the last value not below the first, as in 1.25:2.5:0.25")
            if count > MAX_SETTINGS:
                raise UserError(f"--{option} {text}: that makes {count + 1:,} values; take a larger step")
            return [float(first + i * step) for i in range(count + 1)]
        return [float(Decimal(part)) for part in text.split(",")]
    except (InvalidOperation, ValueError) as error:
        raise UserError(f"--{option} {text}: expected FIRST:LAST:STEP, or numbers separated by commas") from error


def sweep(
    model: Path,
    reference: str | None,
    out: Path,
    *,
    options_to_try: Mapping[str, Sequence[float]],
    batch_size: int = 64,
    options: EvaluationOptions,
    **sampling: Any,
) -> Sweep:
    """Score every combination of the values; `out` gets sweep.json, sweep.html and a folder of each setting.

    Args:
        options_to_try: sampler option to its values.
        sampling: see `genvision.jobs.sample.open_job`; sampler options that are the same everywhere stand here.

    Raises:
        UserError: nothing to try, an option is unknown or impossible; see `fid`.
    """
    names = list(options_to_try)
    combinations = list(itertools.product(*options_to_try.values()))
    if not names or not combinations:
        raise UserError("nothing to try; give values for an option of the sampler, for example --guidance 1.25:2.5:0.25")
    if len(combinations) > MAX_SETTINGS:
        raise UserError(f"{len(combinations):,} settings are too many; try at most {MAX_SETTINGS} at a time")
    pipeline, request = open_job(model, batch_size=batch_size, **sampling)
    base = pipeline.sampler
    settings = [dict(zip(names, values, strict=True)) for values in combinations]
    for setting in settings:  # every impossible value is refused before the first image
        base.with_options(**_typed(base, setting)).check(pipeline.generator, pipeline.guide)
    plan = None
    results = []
    state = process_state()
    for i, setting in enumerate(settings):
        pipeline.sampler = base.with_options(**_typed(base, setting))
        sampled = SampledSet(pipeline=pipeline, request=request, model=str(model))
        plan = plan or plan_sampled(sampled, reference, options)
        if state.is_main_process and options.show_progress:
            print(f"{i + 1}/{len(settings)} {_name(setting)}", flush=True)
        results.append(fid(sampled, plan, out / _name(setting), batch_size=batch_size, page=False))
    done = Sweep(settings=settings, results=results)
    if state.is_main_process:
        write_atomically(out / "sweep.json", json.dumps(_content(done), indent=2, allow_nan=False) + "\n")
        write_sweep_page(out / "sweep.html", done.settings, done.results, done.best)
    state.wait_for_everyone()
    return done


def format_sweep(done: Sweep) -> str:
    """A table of all settings, and the best one with its interval."""
    shown = [(key, title) for key, title in COLUMNS if any(getattr(result, key) is not None for result in done.results)]
    names = list(done.settings[0])
    header = [*names, *(title for _, title in shown)]
    rows = []
    for i, (setting, result) in enumerate(zip(done.settings, done.results, strict=True)):
        scores = ["-" if getattr(result, key) is None else f"{getattr(result, key):.4f}" for key, _ in shown]
        rows.append([*(f"{setting[name]:g}" for name in names), *scores, "best" if i == done.best else "tie" if i in done.ties else ""])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(header, widths, strict=True))]
    lines += ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
    best = done.results[done.best]
    interval = "" if best.fid_interval is None else f" [{best.fid_interval[0]:.4f}, {best.fid_interval[1]:.4f}]"
    lines += ["", f"best: {_name(done.settings[done.best])}, FID {_fid(best):.4f}{interval} with {best.num_generated:,} images"]
    if done.ties:
        lines.append(f"{len(done.ties)} other settings reach into this interval; draw more images of them to tell them apart")
    return "\n".join(lines)


def _fid(result: EvaluationResult) -> float:
    if result.fid is None:
        raise UserError("a sweep compares settings by FID; leave --metrics out, or name fid in it")
    return result.fid


def _typed(sampler: Any, setting: Mapping[str, float]) -> dict[str, float | int]:
    """Values in the type of the option's own."""
    return {name: int(value) if isinstance(sampler.config.get(name), int) else value for name, value in setting.items()}


def _name(setting: Mapping[str, float]) -> str:
    return re.sub(r"[^\w.,=-]", "_", ",".join(f"{name}={value:g}" for name, value in setting.items()))


def _content(done: Sweep) -> dict[str, Any]:
    keys = [key for key, _ in COLUMNS]
    return {
        "schema": "genvision.sweep/1",
        "best": done.settings[done.best],
        "ties": [done.settings[i] for i in done.ties],
        "settings": [
            {
                "folder": _name(setting),
                **setting,
                **{key: getattr(result, key) for key in keys},
                "fid_interval": result.fid_interval,
                "num_generated": result.num_generated,
            }
            for setting, result in zip(done.settings, done.results, strict=True)
        ],
    }
