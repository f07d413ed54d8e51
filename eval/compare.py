"""Result files side by side: scores with their intervals, what differs between the files, and which scores cannot be compared at all."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genvision.errors import UserError
from genvision.eval.comparability import Obstacle, find_obstacles
from genvision.eval.document import breakable, document, escape, facts_table, paragraph, section, warning_box
from genvision.eval.plots import interval_bar
from genvision.eval.report import (
    NOT_FIELDS,
    SCORES,
    field_title,
    flatten,
    interval_text,
    is_score_key,
    score_number,
    score_text,
    value_text,
    write_text,
)
from genvision.eval.result import read_content, validate

NO_TEST = (
    "Intervals that overlap are no test: two scores may differ for certain while their intervals overlap a little, and among many scores "
    "some come apart by chance. Draw other seeds to be sure."
)
LINE = 120
"""Characters of a line of running text in the terminal."""
HARMLESS = ("num_processes", "reference_cached", "seconds", "images_per_second")
"""Facts that move no score: shown last and not marked."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A score of one result, beside that of the first."""

    value: float | None
    interval: tuple[float, float] | None = None
    difference: float | None = None
    """To the first result; None in its own column, and where one of the two was not measured."""
    overlaps: bool | None = None
    """Whether the two intervals overlap; None without intervals."""
    broken_by: tuple[str, ...] = ()
    """Keys that forbid the comparison with the first."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results side by side; every list in a row has one entry for each result."""

    names: list[str]
    contents: list[dict[str, Any]]
    scores: dict[str, list[Cell]]
    """Key of each score that any result has, in the order of the report."""
    obstacles: list[Obstacle]
    """Strict ones first."""
    differing: dict[str, list[Any]]
    """Key of each fact that is not the same in all; None where a result lacks it."""
    equal: dict[str, Any]
    """Facts that are the same in all."""


def compare(paths: Sequence[Path]) -> Comparison:
    """Result files side by side; the first is the one that others are measured against.

    Raises:
        UserError: fewer than two files, or one is no result.
    """
    if len(paths) < 2:
        raise UserError(f"a comparison needs at least 2 result files, got {len(paths)}; give more")
    return compare_contents(short_names(paths), [_read(path) for path in paths])


def compare_contents(names: Sequence[str], contents: Sequence[dict[str, Any]]) -> Comparison:
    """As `compare`, of what the files hold."""
    flat = [flatten(content) for content in contents]
    keys = list(dict.fromkeys(key for content in flat for key in content))
    keys.sort(key=lambda key: key in HARMLESS)
    facts = [key for key in keys if not is_score_key(key) and key.split(".")[0] not in NOT_FIELDS]
    table = {key: [content.get(key) for content in flat] for key in facts}
    return Comparison(
        names=list(names),
        contents=list(contents),
        scores={key: cells for score in SCORES if score.better and (cells := _cells(key := score.key, contents))},
        obstacles=find_obstacles(contents),
        differing={key: values for key, values in table.items() if any(value != values[0] for value in values)},
        equal={key: values[0] for key, values in table.items() if all(value == values[0] for value in values) and values[0] is not None},
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without suffix; where all files bear one name, their folders are named."""
    parts = [[*path.absolute().parent.parts, path.stem] for path in paths]
    trimmed = [part[:-1] if all(other[-1] == parts[0][-1] for other in parts) and len(part) > 1 else part for part in parts]
    for depth in range(1, max(len(part) for part in trimmed) + 1):
        names = ["/".join(part[-depth:]) for part in trimmed]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(path.stem for path in paths)]


def format_comparison(comparison: Comparison) -> str:
    """Aligned lines for the terminal: what cannot be compared, scores, facts that differ (marked `*`), facts that do not."""
    lines = [f"{'not comparable' if entry.rule.is_strict else 'compare with care'}: {entry.line}" for entry in comparison.obstacles]
    lines += [f"warning: {line}" for line in _told(comparison, "warnings")]
    rows = [["", *comparison.names]]
    for key, cells in comparison.scores.items():
        title = next(score.title for score in SCORES if score.key == key)
        rows.append([title, *("-" if cell.value is None else _cell_text(key, cell) for cell in cells)])
        second = ["", *(_difference_text(key, cell) for cell in cells)]
        if any(second):
            rows.append(second)
    rows.append([])
    for key, values in comparison.differing.items():
        rows.append([f"{' ' if key in HARMLESS else '*'} {field_title(key)}", *(_clip(value_text(key, value)) for value in values)])
    columns = range(1 + len(comparison.names))
    widths = [max(len(row[i]) for row in rows if row) for i in columns]
    lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)]
    if any(cell.overlaps is not None for cells in comparison.scores.values() for cell in cells):
        lines += ["", textwrap.fill(NO_TEST, LINE)]
    if comparison.equal:
        same = "; ".join(f"{field_title(key)} {value_text(key, value)}" for key, value in comparison.equal.items())
        lines += ["", textwrap.fill(f"the same in all: {same}", LINE, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines).lstrip("\n")


def write_comparison_page(path: Path, comparison: Comparison) -> None:
    """One self-contained HTML file with the whole comparison."""
    count = len(comparison.names)
    head = (
        '<header><p class="eyebrow">genvision · comparison</p>'
        f"<h1>{escape(' · '.join(comparison.names) if count <= 4 else f'{count} results')}</h1>"
        f'<p class="lead">{count} results side by side. Differences are to the first, {escape(comparison.names[0])}.</p></header>'
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in _told(comparison, "notes"))
    body = [
        head,
        comparison_html(comparison),
        section("Notes", f'<ul class="notes">{notes}</ul>' if notes else ""),
        "<footer>Written by genvision. This page holds everything it shows and loads nothing.</footer>",
    ]
    write_text(path, document(f"Comparison of {', '.join(comparison.names)}", "\n".join(body)))


def comparison_html(comparison: Comparison, title: str = "Scores") -> str:
    """Warnings, scores (under `title`) and facts of a comparison, as parts of a page."""
    strict = [obstacle.line for obstacle in comparison.obstacles if obstacle.rule.is_strict]
    careful = [obstacle.line for obstacle in comparison.obstacles if not obstacle.rule.is_strict]
    has_overlap = any(cell.overlaps is not None for cells in comparison.scores.values() for cell in cells)
    same = facts_table((field_title(key), key, value_text(key, value)) for key, value in comparison.equal.items())
    return "\n".join(
        [
            warning_box("These scores cannot be compared", strict),
            warning_box("Compare with care", careful),
            warning_box("Warnings of the results", _told(comparison, "warnings")),
            section(title, _score_table(comparison), paragraph(NO_TEST, "soft") if has_overlap else ""),
            section("What differs", _difference_table(comparison)),
            f"<section><details><summary>{len(comparison.equal)} facts are the same in all</summary>{same}</details></section>"
            if same
            else "",
        ]
    )


def _read(path: Path) -> dict[str, Any]:
    """A result file of any kind, checked."""
    content = read_content(path)
    if isinstance(content, dict) and str(content.get("schema")).startswith("genvision.reconstruction/"):
        from genvision.eval.reconstruction import ReconstructionResult  # brings torch

        validate(content, str(path), ReconstructionResult)
    else:
        validate(content, str(path))
    checked: dict[str, Any] = content
    return checked


def _cells(key: str, contents: Sequence[dict[str, Any]]) -> list[Cell]:
    """One for each result; empty if none has the score."""
    values = [content.get(key) for content in contents]
    if all(value is None for value in values):
        return []
    intervals = [tuple(interval) if (interval := content.get(f"{key}_interval")) else None for content in contents]
    cells = [Cell(value=values[0], interval=intervals[0])]
    for content, value, interval in zip(contents[1:], values[1:], intervals[1:], strict=True):
        if value is None or values[0] is None:
            cells.append(Cell(value=value, interval=interval))
            continue
        first = intervals[0]
        cells.append(
            Cell(
                value=value,
                interval=interval,
                difference=value - values[0],
                overlaps=None if first is None or interval is None else bool(interval[0] <= first[1] and first[0] <= interval[1]),
                broken_by=tuple(one.rule.key for one in find_obstacles([contents[0], content]) if one.rule.is_strict and key in one.scores),
            )
        )
    return cells


def _told(comparison: Comparison, key: str) -> list[str]:
    """Warnings or notes, each once, after the names of the results that have it."""
    having: dict[str, list[str]] = {}
    for name, content in zip(comparison.names, comparison.contents, strict=True):
        for text in content.get(key) or ():
            having.setdefault(text, []).append(name)
    return [f"{'all' if len(names) == len(comparison.names) else ', '.join(names)}: {text}" for text, names in having.items()]


def _cell_text(key: str, cell: Cell) -> str:
    return score_text({key: cell.value, f"{key}_interval": cell.interval}, key)


def _judge(key: str, cell: Cell) -> str:
    """`better` or `worse` than the first; empty if they are equal or the comparison is broken."""
    better = next(score.better for score in SCORES if score.key == key)
    if not cell.difference or cell.broken_by:
        return ""
    return "better" if (cell.difference < 0) == (better == "lower") else "worse"


def _difference_text(key: str, cell: Cell) -> str:
    """`-0.83 better, intervals apart`"""
    if cell.difference is None:
        return ""
    if cell.broken_by:
        return "not comparable"
    words = [_signed(key, cell.difference)]
    if verdict := _judge(key, cell):
        words[0] += f" {verdict}"
    if cell.overlaps is not None:
        words.append("intervals overlap" if cell.overlaps else "intervals apart")
    return ", ".join(words)


def _signed(key: str, difference: float, *, short: bool = False) -> str:
    text = score_number(key, difference, short=short)
    return text if text.startswith("-") else f"+{text}"


def _clip(text: str, width: int = 44) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _score_table(comparison: Comparison) -> str:
    heads = ""
    for name, content in zip(comparison.names, comparison.contents, strict=True):
        model = content.get("model") or content.get("generated") or content.get("data") or ""
        below = f'<br><span class="soft">{breakable(model)}</span>' if model not in ("", name) else ""
        heads += f'<th scope="col">{breakable(name)}{below}</th>'
    rows = []
    for score in SCORES:
        cells = comparison.scores.get(score.key)
        if cells:
            marks = "".join(f"<td>{_cell_html(score.key, cell, cells)}</td>" for cell in cells)
            hint = f'<br><span class="soft">{score.better} is better</span>'
            rows.append(f'<tr><th scope="row">{escape(score.title)}{hint}</th>{marks}</tr>')
    return (
        f'<div class="scroll"><table class="compare"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _cell_html(key: str, cell: Cell, row: Sequence[Cell]) -> str:
    """Number, interval on a scale that the row shares (that of the first shaded), difference in words."""
    if cell.value is None:
        return '<span class="soft">not measured</span>'
    reach = [number for other in row if other.value is not None for number in (other.value, *(other.interval or ()))]
    room = 0.08 * (max(reach) - min(reach))
    number = f'<span class="number">{escape(score_number(key, cell.value, short=True))}</span>'
    interval = "" if cell.interval is None else f' <span class="soft">{escape(interval_text(key, cell.interval, short=True))}</span>'
    bar = interval_bar(cell.value, cell.interval, min(reach) - room, max(reach) + room, band=row[0].interval)
    if cell.difference is None:
        return number + interval + bar
    if cell.broken_by:
        words = f"not comparable: {', '.join(field_title(name) for name in cell.broken_by)}"
        return f'{number}{interval}{bar}<span class="delta void">{escape(words)}</span>'
    verdict = _judge(key, cell)
    colour = {"better": "good", "worse": "bad", "": "soft"}[verdict]
    overlap = {None: "", True: "intervals overlap", False: "intervals apart"}[cell.overlaps]
    words = " ".join(part for part in (_signed(key, cell.difference, short=True), verdict) if part)
    tail = f' <span class="soft">{overlap}</span>' if overlap else ""
    return f'{number}{interval}{bar}<span class="delta"><span class="{colour}">{escape(words)}</span>{tail}</span>'


def _difference_table(comparison: Comparison) -> str:
    """Facts that differ; those unlike the first are marked."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in comparison.names)
    rows = []
    for key, values in comparison.differing.items():
        cells = ""
        for value in values:
            mark = ' class="other"' if value != values[0] and key not in HARMLESS else ""
            cells += f"<td{mark}>{escape(value_text(key, value))}</td>"
        rows.append(f'<tr><th scope="row" title="{escape(key)}">{escape(field_title(key))}</th>{cells}</tr>')
    if not rows:
        return paragraph("Nothing: all facts are the same.", "soft")
    return (
        f'<div class="scroll"><table class="compare"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
