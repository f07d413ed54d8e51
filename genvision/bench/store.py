"""Results in a JSON file, each with what it depends on besides the code; a run adds its rows and replaces those that it measured anew."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from genvision.bench.machine import describe_machine, describe_versions
from genvision.bench.plan import ROWS, Form
from genvision.bench.row import Result, Spread
from genvision.errors import UserError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A result and its circumstances."""

    result: Result
    form: Form
    machine: str
    versions: str
    load: float
    """Of the machine over the minute before the row ended; 1 is one busy core."""
    day: str
    """ISO 8601."""


def entry_of(result: Result, form: Form) -> Entry:
    """A result that was measured just now."""
    return Entry(
        result=result,
        form=form,
        machine=describe_machine(),
        versions=describe_versions(),
        load=round(os.getloadavg()[0], 2),
        day=date.today().isoformat(),
    )


def merged(old: Sequence[Entry], new: Entry) -> list[Entry]:
    """In the order of the plan, with one entry a row."""
    entries = {entry.result.row: entry for entry in old} | {new.result.row: new}
    return [entries[name] for name in ROWS if name in entries]


def read_entries(path: Path, form: Form) -> list[Entry]:
    """What the file holds; nothing if it is not there. Rows that the plan no longer has are left out.

    Raises:
        UserError: it is no such file, or holds results of another form.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        entries = [_entry(item) for item in document["results"]] if document["format_version"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        entries = None
    if entries is None:
        raise UserError(f"{path}: not a file of results that this version of genvision benchmark wrote; give --out a new name")
    if any(entry.form != form for entry in entries):
        raise UserError(f"{path}: holds results of the {entries[0].form} form, and this is the {form} one; give --out another name")
    return [entry for entry in entries if entry.result.row in ROWS]


def write_entries(path: Path, entries: Sequence[Entry]) -> None:
    document = {"format_version": FORMAT, "results": [_flat(entry) for entry in entries]}
    from genvision.training.state import write_atomically  # which imports torch

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def _flat(entry: Entry) -> dict[str, Any]:
    item = {name: value for name, value in asdict(entry).items() if name != "result"} | asdict(entry.result)
    return item | {name: value._asdict() for name, value in item.items() if isinstance(value, Spread)}


def _entry(item: dict[str, Any]) -> Entry:
    values = {field.name: item[field.name] for field in fields(Result)}
    values |= {name: Spread(**values[name]) for name in ("ratio", "fraction") if values[name] is not None}
    values["notes"] = tuple(values["notes"])
    return Entry(result=Result(**values), **{field.name: item[field.name] for field in fields(Entry) if field.name != "result"})
