"""Probes of all layers as a table for the terminal and as a chart: accuracy against layer, raw inputs as dashed levels.

The chart is a file of its own (SVG), so it brings its colours along; it has a white ground and needs nothing from a page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from genvision.eval.plots import HEIGHT, NUM_COLOURS, WIDTH, Point, Series, line_chart
from genvision.eval.probe import ProbeResult
from genvision.eval.report import format_table

COLOURS = ("#1c5d99", "#c4500f", "#19805b", "#9a4f8f", "#3c97c4", "#b38300")
MARGIN, HEADING, LINE = 16, 46, 18


def format_probe(result: ProbeResult) -> str:
    """The facts of a result, and a table with a row for each layer."""
    columns = list(dict.fromkeys(_method(row) for row in result.rows))
    body = [
        [str(layer), *(_cell(result.rows, layer=layer, method=method) for method in columns)]
        for layer in sorted({row["layer"] for row in result.rows})
    ]
    header = ["layer", *columns]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [header, *body]]
    raw = [f"raw {row['input']}, {row['probe']}: {row['top1']:.1%}" for row in result.baselines]
    facts = format_table(result)
    facts = "\n".join(line for line in facts.splitlines() if not line.startswith(("rows ", "baselines ")))
    return "\n".join([facts, "", *table, *raw, f"chance: {result.chance:.1%}"])


def probe_chart(result: ProbeResult) -> str:
    """An SVG file: a line with intervals for each pooling and probe, a level for each raw input (its better probe); the best is ringed."""
    lines = []
    for method in dict.fromkeys(_method(row) for row in result.rows):
        rows = [row for row in result.rows if _method(row) == method]
        lines.append(Series(name=method, points=[_point(result, row) for row in rows]))
    num_lines = len(lines)
    layers = sorted({row["layer"] for row in result.rows})
    reach = (layers[0], layers[-1]) if len(layers) > 1 else (layers[0] - 0.5, layers[0] + 0.5)
    levels = [*_better_baselines(result), {"input": "chance", "top1": result.chance}]
    for row in levels:
        shown = f"{_level_name(row)}: {row['top1']:.1%}"
        lines.append(Series(name=_level_name(row), points=[Point(x=x, y=100 * row["top1"], title=shown) for x in reach]))
    words = "; ".join(f"layer {row['layer']}, {_method(row)}: {row['top1']:.1%}" for row in result.rows)
    chart = line_chart(lines, "layer (0 is what the first block reads)", "top-1 accuracy (%)", x_ticks=layers, described=words)
    legend = _legend([line.name for line in lines], num_lines)
    height = HEADING + HEIGHT + LINE * len(lines) + MARGIN
    title = f"Frozen features of {result.model or 'the generator'}"
    labels = "" if result.num_labels == result.num_train else f"labels of {result.num_labels:,} of "
    facts = f"{labels}{result.num_train:,} training and {result.num_test:,} test images, {result.num_classes:,} classes"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * height}" viewBox="0 0 {WIDTH} {height}">'
        f"<style>{style_rules(num_lines if len(layers) > 1 else 0, len(levels))}</style>"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        f'<text class="title" x="{MARGIN}" y="20">{escape(title)}</text>'
        f'<text class="facts" x="{MARGIN}" y="37">{escape(facts)}</text>'
        f'<svg y="{HEADING}" width="{WIDTH}" height="{HEIGHT}">{chart}</svg>'
        f'<g transform="translate(0 {HEADING + HEIGHT + 6})">{legend}</g>'
        "</svg>\n"
    )


def _better_baselines(result: ProbeResult) -> list[dict[str, Any]]:
    names = dict.fromkeys(row["input"] for row in result.baselines)
    return [max((row for row in result.baselines if row["input"] == name), key=lambda row: row["top1"]) for name in names]


def _method(row: Mapping[str, Any]) -> str:
    return "attentive" if row["probe"] == "attentive" else f"{row['pooling']}, {row['probe']}"


def _level_name(row: Mapping[str, Any]) -> str:
    return f"raw {row['input']}, {row['probe']}" if "probe" in row else str(row["input"])


def _cell(rows: Sequence[Mapping[str, Any]], *, layer: int, method: str) -> str:
    return next((f"{row['top1']:.1%}" for row in rows if row["layer"] == layer and _method(row) == method), "-")


def _point(result: ProbeResult, row: Mapping[str, Any]) -> Point:
    low, high = row["interval"]
    is_best = (row["layer"], row["pooling"], row["probe"]) == (result.layer, result.pooling, result.probe)
    title = f"layer {row['layer']}, {_method(row)}: {row['top1']:.1%}"
    return Point(x=row["layer"], y=100 * row["top1"], interval=(100 * low, 100 * high), is_best=is_best, title=title)


def _legend(names: Sequence[str], num_lines: int) -> str:
    entries = []
    for i, name in enumerate(names):
        colour = f"c{i % NUM_COLOURS}"
        y = LINE * i + 6
        style = "line" if i < num_lines else "line level"
        entries.append(f'<line class="{style} {colour}" x1="{MARGIN}" x2="{MARGIN + 24}" y1="{y}" y2="{y}"/>')
        entries.append(f'<text class="facts" x="{MARGIN + 32}" y="{y + 4}">{escape(name)}</text>')
    return "".join(entries)


def style_rules(num_lines: int, num_levels: int) -> str:
    """Rules for the classes of `genvision.eval.plots`, in plain colours: not every viewer of SVG knows CSS variables."""
    rules = [
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;font-size:12px;fill:#5d6470}",
        ".title{font-size:15px;font-weight:600;fill:#17191e}.facts{font-size:12px}.name{fill:#17191e}",
        ".grid{stroke:#e3e6eb}.axis{stroke:#8b929e}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}",
        ".whisker{fill:none;stroke-width:1.2;opacity:.7}.ring{fill:none;stroke:#17191e;stroke-width:1.4}.level{stroke-dasharray:5 4}",
        *(f".c{i}{{stroke:{colour}}}.dot.c{i}{{fill:{colour};stroke:#fff}}" for i, colour in enumerate(COLOURS)),
    ]
    # the chart draws its lines in order, the levels last
    rules += [f".chart>polyline:nth-of-type({num_lines + i + 1}){{stroke-dasharray:5 4}}" for i in range(num_levels)]
    return "".join(rules)
