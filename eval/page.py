"""A result as a page for people: one HTML file with scores, intervals, samples, classes and everything that the scores depend on.

Images: uint8 [N, H, W, 3] with labels [N].
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genvision.eval.compare import compare_contents, comparison_html
from genvision.eval.document import breakable, document, escape, facts_table, legend, paragraph, section, warning_box
from genvision.eval.gallery import IMAGES_PER_CLASS, MAX_SAMPLES, choose_classes, classes_section, samples_section
from genvision.eval.plots import Point, Series, convergence_chart, interval_bar, line_chart
from genvision.eval.protocols import PROTOCOLS
from genvision.eval.report import (
    SCORE_OF,
    field_title,
    flatten,
    interval_text,
    report_sentence,
    score_number,
    to_content,
    value_text,
    write_text,
)
from genvision.eval.result import EvaluationResult

CARDS = ("fid", "sfid", "fd_dinov2", "inception_score", "precision", "recall", "f_score", "kid", "class_accuracy")
FACTS = {
    "What was scored": (
        "model",
        "generated",
        "generated_hash",
        "num_generated",
        "generated_formats",
        "num_duplicates",
        "labels",
        "order",
        "image_size",
        "crop",
    ),
    "What it was compared with": (
        "reference",
        "reference_hash",
        "reference_origin",
        "num_reference",
        "num_reference_statistics",
        "reference_cached",
    ),
    "How the scores were computed": (
        "protocol",
        "extractor",
        "extractor_hash",
        "resize",
        "feature_dim",
        "dinov2_hash",
        "judge_hash",
        "is_estimator",
        "is_splits",
        "is_block_size",
        "is_shuffle_seed",
        "kid_estimator",
        "kid_subsets",
        "kid_subset_size",
        "kid_seed",
        "pr_k",
        "pr_mode",
        "order_sensitive",
        "interval_method",
        "feature_dtype",
        "statistics_dtype",
    ),
    "How the images were drawn": ("sampling",),
    "The run": ("kind", "num_processes", "batch_size", "device", "seconds", "images_per_second", "versions", "schema"),
}
"""Heading to keys; together with the scores and what has a place of its own these are all fields of a result."""
MAX_WIDTH = 0.5
"""An interval that reaches further from its score, as a part of it, gets no bar: it would make all others invisible."""
FOOTER = "<footer>Written by genvision. This page holds everything it shows and loads nothing.</footer>"


def write_page(
    path: Path,
    result: EvaluationResult,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    label_names: Sequence[str] | None = None,
    compare: Sequence[EvaluationResult] = (),
) -> None:
    """Write the page of a result.

    Args:
        images: some of the images that were scored; up to MAX_SAMPLES of them, evenly spread over the array, become the grid.
        labels: class of each image; gives a row of images for each class.
        label_names: names of the classes.
        compare: other results to set beside this one.
    """
    content = to_content(result)
    title = result.model or result.generated
    body = [
        _head(result, title),
        warning_box("Read this first", result.warnings),
        _cards(content),
        samples_section(images, labels, label_names, result.num_generated),
        classes_section(result, images, labels, label_names),
        _convergence(result),
        _beside(content, compare),
        section("How to report this", f"<blockquote>{escape(report_sentence(result))}</blockquote>"),
        section("Notes", _list(result.notes)),
        _facts(content),
        _raw(content),
        FOOTER,
    ]
    write_text(path, document(f"Evaluation of {title}", "\n".join(part for part in body if part)))


def write_sweep_page(path: Path, settings: list[dict[str, float]], results: list[EvaluationResult], best: int) -> None:
    """Write the page of a sweep: curves of FID and Inception Score against the option of most values, and all settings in a table.

    Args:
        settings: sampler option to value, the same options in each.
        results: one for each setting, each with an FID.
        best: index of the setting of lowest FID.
    """
    assert settings and len(settings) == len(results), "a sweep has one result for each setting"
    names = list(settings[0])
    swept = max(names, key=lambda name: len({setting[name] for setting in settings}))
    winner = results[best]
    title = winner.model or winner.generated
    num = f"{winner.num_generated:,} images a setting"
    lead = " · ".join(
        [
            f"{len(settings)} setting{'s' if len(settings) > 1 else ''} of {', '.join(field_title(name) for name in names)}",
            f"protocol {winner.protocol}",
            num,
        ]
    )
    shown = [key for key in CARDS if any(getattr(result, key) is not None for result in results)]
    charts = [_sweep_chart(key, swept, settings, results, best) for key in ("fid", "inception_score") if key in shown]
    if "inception_score" in shown:
        charts.append(_trade_off(swept, settings, results, best))
    others = _others(swept, settings)
    warnings = _told_once([line for result in results for line in result.warnings])
    chosen = ", ".join(f"{field_title(name)} {value:g}" for name, value in settings[best].items())
    body = [
        f'<header><p class="eyebrow">genvision · sweep</p><h1>{breakable(title)}</h1>{paragraph(lead, "lead")}</header>',
        warning_box("Read this first", warnings),
        section("Best setting", paragraph(chosen), _cards(to_content(winner)), paragraph(_ties(results, best), "soft")),
        section(
            "Curves",
            legend([_other_text(other) for other in others]) if len(others) > 1 else "",
            f'<div class="pair">{"".join(charts)}</div>',
        ),
        section("All settings", _sweep_table(names, shown, settings, results, best)),
        section("How to report this", f"<blockquote>{escape(report_sentence(winner))}</blockquote>"),
        FOOTER,
    ]
    write_text(path, document(f"Sweep of {title}", "\n".join(part for part in body if part)))


def _told_once(lines: Sequence[str]) -> list[str]:
    """Lines that differ in their numbers alone are told once, with how many settings they came from."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(re.sub(r"\d[\d,.]*", "#", line), []).append(line)
    return [same[0] if len(same) == 1 else f"{same[0]} (so or alike in {len(same)} settings)" for same in kinds.values()]


def page_indices(labels: np.ndarray, per_class: Sequence[dict[str, Any]] | None = None) -> list[int]:
    """Which images of a set its page needs: the first few of each class shown, or a grid's worth, evenly spread, of a set of one class.

    Args:
        labels: of all images, [N].
        per_class: `EvaluationResult.per_class`, so that the worst and the best of many classes are shown.
    """
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        return [int(i) for i in np.linspace(0, len(labels) - 1, min(MAX_SAMPLES, len(labels))).round()]
    chosen = [np.flatnonzero(labels == label)[:IMAGES_PER_CLASS] for label in choose_classes(per_class, labels)]
    return [int(i) for i in np.concatenate(chosen)]


def _head(result: EvaluationResult, title: str) -> str:
    facts = [f"{result.num_generated:,} images of {result.image_size} x {result.image_size} pixels", f"labels {result.labels}"]
    facts += [f"reference {result.reference}"] if result.reference else []
    protocol = PROTOCOLS.get(result.protocol)
    source = f" ({protocol.source})" if protocol else ""
    return (
        f'<header><p class="eyebrow">genvision · evaluation</p><h1>{breakable(title)}</h1>{paragraph(" · ".join(facts), "lead")}'
        f"{paragraph(f'Protocol {result.protocol}{source}', 'lead')}</header>"
    )


def _cards(content: dict[str, Any]) -> str:
    """The scores in large figures; their intervals on one relative scale, so that bars can be compared."""
    measured = [SCORE_OF[key] for key in CARDS if content.get(key) is not None]
    widths = {}
    for score in measured:
        interval, value = content.get(f"{score.key}_interval"), content[score.key]
        if interval and value:
            widths[score.key] = max(abs(bound - value) for bound in interval) / abs(value)
    drawn = {key: width for key, width in widths.items() if width <= MAX_WIDTH}
    scale = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if step >= max(drawn.values(), default=0))
    cards = []
    for score in measured:
        value, interval = content[score.key], content.get(f"{score.key}_interval")
        spread = content.get(f"{score.key}_std")
        if interval:
            text = f"95 % {interval_text(score.key, interval, short=True)}"
        elif spread is not None:
            text = (
                f"± {score_number(f'{score.key}_std', spread, short=True)} over {'splits' if score.key == 'inception_score' else 'subsets'}"
            )
        else:
            text = ""
        reach = abs(value) * scale
        bar = interval_bar(value, (interval[0], interval[1]), value - reach, value + reach) if interval and score.key in drawn else ""
        arrow = {"lower": "↓", "higher": "↑", "": ""}[score.better]
        cards.append(
            f'<div class="score"><span class="title">{escape(score.title)}<span title="{score.better} is better">{arrow}</span></span>'
            f'<span class="number">{escape(score_number(score.key, value, short=True))}</span>'
            f'<span class="range">{escape(text)}</span>{bar}</div>'
        )
    told = ""
    if drawn:
        told = paragraph(
            f"Bars show 95 % intervals; each line reaches from {100 * scale:g} % below to {100 * scale:g} % above its score.", "soft"
        )
    if content.get("order_sensitive"):
        titles = ", ".join(SCORE_OF[key].title if key in SCORE_OF else key for key in content["order_sensitive"])
        told += paragraph(f"Depends on the order of the images: {titles}. No other score does.", "soft")
    return f'<div class="scores">{"".join(cards)}</div>{told}' if cards else paragraph("No score was measured.")


def _convergence(result: EvaluationResult) -> str:
    """What FID would be with more images."""
    if result.fid is None or (not result.fid_curve and result.fid_bias is None):
        return ""
    chart = (
        convergence_chart(result.fid_curve, result.fid_infinity, result.fid_infinity_interval, result.fid_interval)
        if result.fid_curve
        else ""
    )
    lines = []
    if result.fid_infinity is not None:
        interval = f" {interval_text('fid', result.fid_infinity_interval, short=True)}" if result.fid_infinity_interval else ""
        lines.append(
            f"Extrapolated to infinitely many images (diamond): FID {score_number('fid', result.fid_infinity, short=True)}{interval}."
        )
    elif result.fid_curve:
        lines.append("There are too few images to extrapolate to infinitely many.")
    if result.fid_bias is not None:
        debiased = "" if result.fid_debiased is None else f"; less that, FID {score_number('fid', result.fid_debiased, short=True)}"
        lines.append(
            f"The number of images alone adds about {score_number('fid_bias', result.fid_bias)} "
            f"(c/N, from the covariance of the reference){debiased}."
        )
    lines.append("Published values carry no such correction; never set a corrected value beside them.")
    return section(
        "FID and the number of images", f'<div class="pair">{chart}<div>{"".join(paragraph(line) for line in lines)}</div></div>'
    )


def _beside(content: dict[str, Any], others: Sequence[EvaluationResult]) -> str:
    if not others:
        return ""
    contents = [content, *(to_content(other) for other in others)]
    names = ["this result", *(f"other {i + 1}" if len(others) > 1 else "other" for i in range(len(others)))]
    return comparison_html(compare_contents(names, contents), "Beside other results")


def _facts(content: dict[str, Any]) -> str:
    tables = []
    for heading, keys in FACTS.items():
        flat = flatten({key: content[key] for key in keys})
        rows = [(_fact_title(key), key, value_text(key, value)) for key, value in flat.items() if value is not None and value != []]
        if rows:
            tables.append(f"<div><h3>{escape(heading)}</h3>{facts_table(rows)}</div>")
    return section("What the scores depend on", f'<div class="facts-grid">{"".join(tables)}</div>')


def _fact_title(key: str) -> str:
    return field_title(key.removeprefix("sampling.").removeprefix("versions."))


def _raw(content: dict[str, Any]) -> str:
    """The result file itself, for those who want to copy it."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return f'<section class="raw"><details><summary>The result file (JSON)</summary><pre>{escape(text)}</pre></details></section>'


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _others(swept: str, settings: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Each combination of the options that a curve holds fixed."""
    combinations: list[dict[str, float]] = []
    for setting in settings:
        rest = {name: value for name, value in setting.items() if name != swept}
        if rest not in combinations:
            combinations.append(rest)
    return combinations


def _other_text(other: dict[str, float]) -> str:
    return ", ".join(f"{field_title(name)} {value:g}" for name, value in other.items())


def _curves(swept: str, settings: Sequence[dict[str, float]], points: Sequence[Point | None]) -> list[Series]:
    """One line for each combination of the other options, along the swept one."""
    series = []
    for other in _others(swept, settings):
        mine = [i for i, setting in enumerate(settings) if {**setting, **other} == setting]
        mine.sort(key=lambda i: settings[i][swept])
        series.append(Series(name=_other_text(other), points=[point for i in mine if (point := points[i])]))
    return [line for line in series if line.points]


def _sweep_chart(key: str, swept: str, settings: Sequence[dict[str, float]], results: Sequence[EvaluationResult], best: int) -> str:
    points = []
    for i, (setting, result) in enumerate(zip(settings, results, strict=True)):
        value = getattr(result, key)
        interval = getattr(result, f"{key}_interval", None)
        title = f"{_other_text(setting)}: {SCORE_OF[key].title} {score_number(key, value)}" if value is not None else ""
        points.append(None if value is None else Point(x=setting[swept], y=value, interval=interval, is_best=i == best, title=title))
    values = sorted({setting[swept] for setting in settings})
    ticks = values if len(values) <= 9 else None
    return line_chart(
        _curves(swept, settings, points),
        field_title(swept),
        SCORE_OF[key].title,
        x_ticks=ticks,
        described=f"{SCORE_OF[key].title} against {field_title(swept)}",
    )


def _trade_off(swept: str, settings: Sequence[dict[str, float]], results: Sequence[EvaluationResult], best: int) -> str:
    """FID against Inception Score, the curve that guidance trades along."""
    points: list[Point | None] = []
    for i, (setting, result) in enumerate(zip(settings, results, strict=True)):
        if result.fid is None or result.inception_score is None:
            points.append(None)
            continue
        points.append(
            Point(x=result.inception_score, y=result.fid, interval=result.fid_interval, is_best=i == best, title=_other_text(setting))
        )
    return line_chart(_curves(swept, settings, points), "Inception Score", "FID", described="FID against Inception Score")


def _ties(results: Sequence[EvaluationResult], best: int) -> str:
    """How many settings cannot be told from the best."""
    winner = results[best].fid_interval
    if winner is None:
        return "Lowest FID of all settings; without intervals nobody can say by how much more than noise."
    ties = sum(i != best and result.fid_interval is not None and result.fid_interval[0] <= winner[1] for i, result in enumerate(results))
    if not ties:
        return "Lowest FID of all settings; no other interval reaches into its own."
    others = "the interval of 1 other reaches" if ties == 1 else f"the intervals of {ties} others reach"
    return f"Lowest FID of all settings, but {others} into its own: draw more images to tell them apart."


def _sweep_table(
    names: Sequence[str], shown: Sequence[str], settings: Sequence[dict[str, float]], results: Sequence[EvaluationResult], best: int
) -> str:
    titles = [*(field_title(name) for name in names), *(SCORE_OF[key].title for key in shown)]
    heads = "".join(f'<th class="num">{escape(title)}</th>' for title in titles)
    lines = []
    for i, (setting, result) in enumerate(zip(settings, results, strict=True)):
        cells = [f"{setting[name]:g}" for name in names]
        for key in shown:
            value, interval = getattr(result, key), getattr(result, f"{key}_interval", None)
            text = "-" if value is None else score_number(key, value, short=True)
            cells.append(text if interval is None else f"{text} {interval_text(key, interval, short=True)}")
        row = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
        mark = "best" if i == best else ""
        lines.append(f'<tr class="{mark}">{row}<td class="num">{mark}</td></tr>')
    return f'<div class="scroll"><table><thead><tr>{heads}<th></th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
