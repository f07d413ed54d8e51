"""A fine-tuning as a table for the terminal and as a chart: test accuracy and training loss against epochs (SVG, a file of its own)."""

from html import escape

from genvision.eval.finetuning import FinetuneResult
from genvision.eval.plots import HEIGHT, WIDTH, Point, Series, line_chart
from genvision.eval.probe_report import HEADING, MARGIN, style_rules
from genvision.eval.report import format_table


def format_finetune(result: FinetuneResult) -> str:
    """The facts of a result; the curve is in the chart."""
    return "\n".join(line for line in format_table(result).splitlines() if not line.startswith("curve "))


def finetune_chart(result: FinetuneResult) -> str:
    """An SVG file: test accuracy with chance below it, and the mean training loss between tests (of mixed images and smoothed labels)."""
    accuracy = Series(name="top-1", points=[_point(row["epoch"], 100 * row["top1"], f"{row['top1']:.1%}") for row in result.curve])
    ends = [result.curve[0]["epoch"], result.curve[-1]["epoch"]]
    ends = [ends[0] - 0.5, ends[0] + 0.5] if ends[0] == ends[1] else ends
    chance = Series(name="chance", points=[Point(x=x, y=100 * result.chance, title=f"chance: {result.chance:.1%}") for x in ends])
    loss = Series(name="loss", points=[_point(row["epoch"], row["loss"], f"loss {row['loss']:.3f}") for row in result.curve])
    low, high = result.top1_interval
    facts = f"{result.top1:.1%} [{low:.1%}, {high:.1%}] of {result.num_test:,} test images (dashed: chance)"  # more does not fit
    words = "; ".join(f"epoch {row['epoch']}: {row['top1']:.1%}, loss {row['loss']:.3f}" for row in result.curve)
    title = f"Fine-tuned from {result.model or 'a generator'}"
    charts = [
        line_chart([accuracy, chance], "epoch", "top-1 accuracy on the test set (%)", described=words),
        line_chart([loss], "epoch", "training loss", described=words),
    ]
    height = HEADING + 2 * HEIGHT + MARGIN
    places = [f'<svg y="{HEADING + i * HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{chart}</svg>' for i, chart in enumerate(charts)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * height}" viewBox="0 0 {WIDTH} {height}">'
        f"<style>{style_rules(1 if len(result.curve) > 1 else 0, 1)}</style>"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        f'<text class="title" x="{MARGIN}" y="20">{escape(title)}</text>'
        f'<text class="facts" x="{MARGIN}" y="37">{escape(facts)}</text>'
        f"{''.join(places)}"
        "</svg>\n"
    )


def _point(epoch: int, value: float, title: str) -> Point:
    return Point(x=epoch, y=value, title=f"epoch {epoch}: {title}")
