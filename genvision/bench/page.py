"""Results as text on a terminal and as a table of a page, which is written between two markers; the rest of the page is left alone."""

from collections.abc import Sequence
from pathlib import Path

from genvision.bench.plan import ROWS
from genvision.bench.row import Result, Spread
from genvision.bench.store import Entry
from genvision.errors import UserError

BENCHMARK, GPU = "benchmark", "gpu"
"""Names of the marked places in docs/performance.md."""


def marker(name: str, end: str) -> str:
    """`end` is begin or end."""
    return f"<!-- {name}: {end} -->"


def marked_page(path: Path, name: str) -> str:
    """The page.

    Raises:
        UserError: it is not there, or has no such markers, each once and in order.
    """
    if not path.is_file():
        raise UserError(f"{path}: is not there; give --page the page that has the line {marker(name, 'begin')}")
    text = path.read_text()
    begin, end = marker(name, "begin"), marker(name, "end")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{path}: the lines {begin} and {end} must stand there once, in this order; add them around the table")
    return text


def write_between(path: Path, name: str, content: str) -> None:
    """Put `content` between the markers of that name."""
    text = marked_page(path, name)
    before, rest = text.split(marker(name, "begin"))
    after = rest.split(marker(name, "end"))[1]
    path.write_text(f"{before}{marker(name, 'begin')}\n\n{content.strip()}\n\n{marker(name, 'end')}{after}")


def format_result(result: Result) -> str:
    """A row for the terminal, several lines."""
    if result.outcome != "measured":
        told = "skipped" if result.outcome == "skipped" else "WRONG, not timed"
        return "\n".join([f"{result.row:4} {result.what}".rstrip(), f"     {told}: {result.reason}"])
    lines = [f"{result.row:4} {result.what}" + (", SAMPLES DIFFER on purpose" if result.samples_differ else "")]
    if result.ratio is not None:
        lines.append(f"     {_times(result.ratio)} of {result.peer}, {result.wall_ratio:.2f}x by wall time; {_goal(result)}")
    floor = f"{_spread(result.fraction)} of the floor ({result.floor}); " if result.fraction is not None else ""
    goal = f"; {_goal(result)}" if result.ratio is None else ""
    clock = f"{result.clock.upper() if result.clock == 'cpu' else 'wall'} time, {result.rounds} rounds"
    lines.append(f"     {floor}{_milliseconds(result)}; {clock}{_coverage(result)}{goal}")
    lines.append(f"     checked: {result.check}")
    return "\n".join([*lines, *(f"     {note}" for note in result.notes)])


def format_page(entries: Sequence[Entry]) -> str:
    """The table, what else was found, and on what it was measured, as Markdown."""
    lines = [
        "| row | work | beside | goal | times as fast | by wall | part of the floor | checked before | ms, ours / theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_table_row(entry.result) for entry in entries]
    notes = [f"- {entry.result.row}: {'; '.join(entry.result.notes)}." for entry in entries if entry.result.notes]
    circumstances: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        circumstances.setdefault((entry.day, entry.machine, entry.versions), []).append(entry)
    measured = []
    for (day, machine, versions), members in circumstances.items():
        rows = "all rows" if len(members) == len(ROWS) else ", ".join(entry.result.row for entry in members)
        loads = [entry.load for entry in members]
        measured.append(f"Measured {day} ({rows}): {machine}; load {min(loads):.1f} to {max(loads):.1f}; {versions}.")
    return "\n".join([*lines, "", *notes, "", *measured])


def _table_row(result: Result) -> str:
    if result.outcome != "measured":
        told = "skipped" if result.outcome == "skipped" else "**wrong, not timed**"
        return f"| {result.row} | {result.what} | {result.peer} | {result.goal} | {told}: {result.reason} | | | | |"
    work = f"{result.what}; **samples differ**" if result.samples_differ else result.what
    ratio = f"**{result.ratio.median:.2f}** [{result.ratio.low:.2f}, {result.ratio.high:.2f}]" if result.ratio is not None else ""
    wall = f"{result.wall_ratio:.2f}" if result.wall_ratio is not None else ""
    floor = f"{_spread(result.fraction)}, {result.floor}" if result.fraction is not None else ""
    goal = result.goal if result.reached is None else f"{result.goal}: {'reached' if result.reached else 'not reached'}"
    cells = [result.row, work, result.peer or "nobody", goal, ratio, wall, floor, result.check, _milliseconds(result, unit_first=True)]
    return f"| {' | '.join(cells)} |"


def _milliseconds(result: Result, *, unit_first: bool = False) -> str:
    numbers = " / ".join(_number(ms) for ms in (result.own_ms, result.peer_ms) if ms is not None)
    return f"{result.unit}: {numbers}" if unit_first else f"{numbers} ms {'an' if result.unit[0] in 'aeiou' else 'a'} {result.unit}"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}x [{spread.low:.2f}, {spread.high:.2f}] the speed"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def _goal(result: Result) -> str:
    if result.reached is None:
        return "no goal, told only"
    return f"goal {result.goal}: {'reached' if result.reached else 'not reached'}"


def _coverage(result: Result) -> str:
    figure = result.ratio or result.fraction
    return f" (intervals hold the median with {figure.coverage:.0%})" if figure is not None else ""
