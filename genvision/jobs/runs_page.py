"""The page of `genvision runs --html`: all runs in a table, and the curves of their losses, one chart for each kind of model."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from genvision.eval.document import breakable, document, escape, legend, paragraph, section
from genvision.eval.page import FOOTER
from genvision.eval.plots import Point, Series, line_chart
from genvision.eval.report import write_text
from genvision.jobs.runs import Curve, Run, number_text, parts_of

CHART_POINTS = 120
MAX_LINES = 12
"""Runs in one chart, those that changed last."""
NOTHING = "-"
"""What stands for a figure that a run does not have."""


def write_runs_page(path: Path, runs: Sequence[Run], folder: Path) -> None:
    """Write the page; losses of different kinds of models cannot be compared, so each kind has a chart of its own."""
    kinds = sorted({run.model or "?" for run in runs})
    body = [
        f'<header><p class="eyebrow">genvision · runs</p><h1>{breakable(folder)}</h1></header>',
        section("Runs", _table(runs)) if runs else paragraph("There are no training runs here."),
        *(_losses(kind, [run for run in runs if (run.model or "?") == kind and run.losses]) for kind in kinds),
        FOOTER,
    ]
    write_text(path, document(f"Training runs in {folder}", "\n".join(part for part in body if part)))


def _table(runs: Sequence[Run]) -> str:
    """Figures that no run has are no column."""
    rows = [_figures(run) for run in runs]
    shown = [title for title in rows[0] if any(row[title] != NOTHING for row in rows)]
    head = "<th>run</th><th>model</th><th>state</th>" + "".join(f"<th class=num>{title}</th>" for title in shown)
    lines = []
    for run, row in zip(runs, rows, strict=True):
        cells = "".join(f'<td class="num">{escape(row[title])}</td>' for title in shown)
        words = "".join(f"<td>{escape(word)}</td>" for word in (run.model or "?", run.state))
        lines.append(f"<tr><th>{breakable(run.name)}</th>{words}{cells}</tr>")
    style = "<style>.runs td,.runs th{overflow-wrap:normal;white-space:nowrap}</style>"
    return f'{style}<div class="scroll runs"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _figures(run: Run) -> dict[str, str]:
    saved = NOTHING
    if run.checkpoint_step is not None and run.checkpoint_time is not None:
        saved = f"{run.checkpoint_step:,}, {run.checkpoint_time[:16].replace('T', ' ')}"
    return {
        "step": f"{run.step:,}" if run.num_steps is None else f"{run.step:,} of {run.num_steps:,}",
        "loss": number_text(run.loss, ".4g"),
        "validation": number_text(run.validation_loss, ".4g"),
        "images/s": number_text(run.images_per_second, ",.0f"),
        "data wait": number_text(run.data_wait, ".1%"),
        "MFU": number_text(run.mfu, ".1%"),
        "skipped": f"{run.skipped_steps:,}",
        "checkpoint": saved,
    }


def _losses(kind: str, runs: Sequence[Run]) -> str:
    """The curves of the runs of one kind of model, and of their validation where there was any."""
    shown = runs[:MAX_LINES]
    if not shown:
        return ""
    charts = [_chart("loss", shown, [run.losses for run in shown])]
    if any(run.validation_losses for run in shown):
        charts.append(_chart("validation loss", shown, [run.validation_losses for run in shown]))
    # dots on so many points would hide the lines
    figure = f'<style>.curves .line~.dot{{display:none}}</style><div class="pair curves">{"".join(charts)}</div>'
    left_out = paragraph(f"The {MAX_LINES} of {len(runs)} runs that changed last.", "soft") if len(runs) > len(shown) else ""
    return section(kind, legend([run.name for run in shown]), figure, left_out)


def _chart(title: str, runs: Sequence[Run], curves: Iterable[Curve]) -> str:
    series = [
        Series(name=run.name, points=[Point(x=step, y=value) for step, value in _thinned(curve)])
        for run, curve in zip(runs, curves, strict=True)
    ]
    last = "; ".join(f"{line.name} {line.points[-1].y:.4g}" for line in series if line.points)
    return line_chart(series, "step", title, described=f"{title} against steps, at last: {last}")


def _thinned(curve: Curve) -> Curve:
    """At most CHART_POINTS of it, each the mean of its part."""
    parts = parts_of(curve, CHART_POINTS)
    return [(round(sum(step for step, _ in part) / len(part)), sum(value for _, value in part) / len(part)) for part in parts]
