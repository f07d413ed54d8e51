"""`genvision runs`: which training runs there are below a folder, how far they have come, and how their losses fell.

A run is a folder that `genvision train` has written: it has a config.yaml of a training, its checkpoints, or its metrics.jsonl. Nothing is
loaded but these, so that a list of many runs is there at once, also while they are running.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import yaml

from genvision.errors import UserError
from genvision.training.json_lines import parsed_line
from genvision.training.run_lock import is_held

State = Literal["running", "finished", "stopped", "failed", "empty"]
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 8
LEAST_NAME = 8
Curve = list[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run say; None where they say nothing."""

    name: str
    """Its folder, from the one that was searched."""
    folder: str
    stage: str | None
    model: str | None
    state: State
    """`running`; `finished`: the model is there; `stopped`: it goes on from a checkpoint with the same command; `failed`: there are lines
    but no checkpoint; `empty`: neither."""
    step: int
    """Of the newest line or checkpoint."""
    num_steps: int | None
    loss: float | None
    validation_loss: float | None
    images_per_second: float | None
    data_wait: float | None
    mfu: float | None
    skipped_steps: int
    num_rewinds: int
    checkpoint_step: int | None
    """Newest checkpoint."""
    checkpoint_time: str | None
    """When it was written, ISO 8601."""
    changed: str
    """When anything of these was written last."""
    losses: Curve = field(repr=False)
    validation_losses: Curve = field(repr=False)


def show_runs(folder: Path, *, as_json: bool = False, html: Path | None = None) -> str:
    """What the command prints: a table, or a JSON list of the fields of `Run` without the curves.

    Args:
        html: also write a page with the curves of the losses.

    Raises:
        UserError: there is no such folder.
    """
    runs = find_runs(folder)
    if html is not None:
        from genvision.jobs.runs_page import write_runs_page

        write_runs_page(html, runs, folder)
    if as_json:
        kept = [f.name for f in dataclasses.fields(Run) if f.name not in ("losses", "validation_losses")]
        return json.dumps([{name: getattr(run, name) for name in kept} for run in runs], indent=2)
    if not runs:
        return f"no training runs below {folder}"
    encoding = sys.stdout.encoding or "ascii"
    return format_runs(runs).encode(encoding, "replace").decode(encoding)  # a terminal may have no blocks for curves


def find_runs(folder: Path) -> list[Run]:
    """All runs in and below a folder, those that changed last first.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with training runs in it")
    runs = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.yaml" in files and (run := read_run(Path(path), folder)) is not None:
            runs.append(run)
            folders.clear()  # there is no run within a run
    return sorted(runs, key=lambda run: run.changed, reverse=True)


def read_run(folder: Path, below: Path) -> Run | None:
    """What is known of the run in a folder; None if none is there."""
    config = _config(folder / "config.yaml")
    model, loop = _section(config, "model"), _section(config, "train")
    metrics = folder / "metrics.jsonl"
    checkpoints = sorted(
        (int(match[1]), path) for path in folder.glob("checkpoints/*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    )
    if not (model and loop) and not checkpoints and not metrics.is_file():
        return None
    lines = _lines(metrics)
    checkpoint_step, checkpoint = checkpoints[-1] if checkpoints else (None, None)
    num_steps = loop.get("num_steps")
    whole = (folder / "model").is_dir() and (checkpoint_step is None or num_steps is None or checkpoint_step >= num_steps)
    state: State = "empty"
    if is_held(folder):
        state = "running"
    elif whole:
        state = "finished"
    elif checkpoints or lines:
        state = "stopped" if checkpoints else "failed"
    written = [folder / "config.yaml", metrics, folder / "model", *([checkpoint] if checkpoint else [])]
    return Run(
        name=str(folder.relative_to(below)) if folder != below else folder.resolve().name,
        folder=str(folder),
        stage=config.get("stage"),
        model=model.get("name"),
        state=state,
        step=max(lines[-1]["step"] if lines else 0, checkpoint_step or 0),
        num_steps=num_steps,
        loss=_last(lines, "loss"),
        validation_loss=_last(lines, "validation_loss"),
        images_per_second=_last(lines, "images_per_second"),
        data_wait=_last(lines, "data_wait"),
        mfu=_last(lines, "mfu"),
        skipped_steps=int(_last(lines, "skipped_steps") or 0),
        num_rewinds=sum(event.get("event") == "rewind" for event in _lines(folder / "events.jsonl")),
        checkpoint_step=checkpoint_step,
        checkpoint_time=_iso(checkpoint.stat().st_mtime) if checkpoint else None,
        changed=_iso(max(path.stat().st_mtime for path in written if path.exists())),
        losses=_curve(lines, "loss"),
        validation_losses=_curve(lines, "validation_loss"),
    )


def format_runs(runs: Sequence[Run], width: int = 80) -> str:
    """A table of at most `width` columns."""
    head = ("run", "model", "state", "step", "loss", "", "img/s", "checkpoint")
    rows = [
        (
            run.name,
            run.model or "?",
            run.state,
            f"{_count(run.step)}/{_count(run.num_steps)}",
            number_text(run.loss, "#.4g"),
            sparkline([value for _, value in run.losses]),
            number_text(run.images_per_second, ".0f"),
            f"{_count(run.checkpoint_step)}, {_age(run.checkpoint_time)} ago" if run.checkpoint_time else "none",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    room = max(width - sum(widths[1:]) - len(widths) + 1, LEAST_NAME)
    widths[0] = min(widths[0], room)
    right = {3, 4, 6}
    lines = []
    for row in (head, *rows):
        cells = [_cut(row[0], room), *row[1:]]
        placed = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(cells)]
        lines.append(" ".join(placed).rstrip())
    return "\n".join(lines)


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A curve as a line of blocks, each the mean of its part; at most one a value."""
    means = [sum(part) / len(part) for part in parts_of(values, width)]
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (value - low) / ((high - low) or 1))] for value in means)


def _config(path: Path) -> dict[str, Any]:
    """Content of a configuration, nothing if it is not one."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        print(f"warning: {path}: cannot be read ({' '.join(str(error).split())[:100]})", file=sys.stderr, flush=True)
        return {}
    return content if isinstance(content, dict) else {}


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """What a file of lines holds; one that is just being written is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [content for line in file if (content := parsed_line(line)) is not None]


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]


def _last(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    """The value of the newest line that has one; None also where it was not finite."""
    found = next((line[name] for line in reversed(lines) if name in line), None)
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def parts_of(values: Sequence[Any], num: int) -> list[Sequence[Any]]:
    """Values in at most `num` parts of nearly equal length."""
    num = min(num, len(values))
    return [values[len(values) * i // num : len(values) * (i + 1) // num] for i in range(num)]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _age(iso: str) -> str:
    """How long ago, in one unit."""
    seconds = max(time.time() - datetime.fromisoformat(iso).timestamp(), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _count(number: int | None) -> str:
    """Three digits and a unit."""
    if number is None:
        return "?"
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= 10 * size or (number >= size and number % size == 0):
            return f"{number / size:.3g}{unit}"
    return str(number)


def number_text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cut(text: str, width: int) -> str:
    """The end of a long name says more than its beginning."""
    return text if len(text) <= width else "…" + text[1 - width :]
