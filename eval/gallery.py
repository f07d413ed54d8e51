"""Pictures on the page of a result: the grid of samples, and a row of images for each class with its scores.

Images: uint8 [N, H, W, 3] with labels [N].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from genvision.eval.document import escape, image_tag, paragraph, section
from genvision.eval.plots import class_ticks
from genvision.eval.report import SCORE_OF, score_number
from genvision.eval.result import EvaluationResult

MAX_SAMPLES, SAMPLE_SIDE = 64, 256
MANY_SAMPLES, MANY_SIDE = 48, 224
"""More samples than that are made a little smaller, or 64 photographs of 256 x 256 pixels would take more than 10 MB."""
BESIDE_CLASSES = 32
"""Samples in the grid where class by class rows follow, which show the same images."""
MAX_CLASSES, IMAGES_PER_CLASS, CLASS_SIDE = 20, 8, 96


def samples_section(images: np.ndarray | None, labels: np.ndarray | None, label_names: Sequence[str] | None, num_scored: int) -> str:
    """The grid of samples: as many as there is room for, evenly spread over those at hand; empty without images."""
    if images is None or len(images) == 0:
        return ""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3, f"images must be uint8 [N, H, W, 3], got {images.shape}"
    has_rows = labels is not None and len(np.unique(labels)) > 1
    shown = np.linspace(0, len(images) - 1, min(BESIDE_CLASSES if has_rows else MAX_SAMPLES, len(images))).round().astype(int)
    side = SAMPLE_SIDE if len(shown) <= MANY_SAMPLES else MANY_SIDE
    tags = [image_tag(images[i], side, _class_name(labels, label_names, int(i))) for i in shown]
    smaller = f", made smaller ({side} pixels at most)" if max(images.shape[1:3]) > side else ""
    where = ", spread evenly over the classes below" if has_rows else ""
    words = f"{len(shown)} of {num_scored:,} images{where}{smaller}."
    return section("Samples", paragraph(words, "soft"), f'<div class="samples">{"".join(tags)}</div>')


def classes_section(
    result: EvaluationResult, images: np.ndarray | None, labels: np.ndarray | None, label_names: Sequence[str] | None
) -> str:
    """A row of images for each class, and where all classes stand."""
    rows = {row["label"]: row for row in result.per_class or ()}
    parts = []
    for key, whole in (("precision", result.precision), ("class_accuracy", result.class_accuracy)):
        values = [row[key] for row in rows.values() if row.get(key) is not None]
        if len(values) > 1:
            title = SCORE_OF[key].title
            words = f"{title} of each of {len(values):,} classes (thin), of all images (thick)"
            parts.append(f"<figure>{class_ticks(values, whole, words)}<figcaption>{escape(words)}</figcaption></figure>")
    if images is not None and labels is not None and len(np.unique(labels)) > 1:
        assert len(labels) == len(images), f"{len(images)} images have {len(labels)} labels"
        chosen = choose_classes(result.per_class, labels)
        if ranks := _ranks(result.per_class):
            parts.append(paragraph(f"{len(chosen)} of {len(ranks):,} classes, the worst first.", "soft"))
        elif len(chosen) < len(np.unique(labels)):
            parts.append(paragraph(f"The first {len(chosen)} of {len(np.unique(labels)):,} classes.", "soft"))
        strips = []
        for label in chosen:
            indices = np.flatnonzero(np.asarray(labels) == label)[:IMAGES_PER_CLASS]
            name = _class_name(labels, label_names, int(indices[0]))
            tags = "".join(image_tag(images[i], CLASS_SIDE, name) for i in indices)
            facts = _class_facts(rows.get(label))
            strips.append(
                f'<div class="class"><div class="who"><b>{escape(name)}</b><span class="soft">{escape(facts)}</span></div>'
                f'<div class="strip">{tags}</div></div>'
            )
        parts.append(f'<div class="classes">{"".join(strips)}</div>')
    elif rows:
        parts.append(_class_table(list(rows.values())))
    return section("Class by class", *parts)


def choose_classes(per_class: Sequence[dict[str, Any]] | None, labels: np.ndarray, limit: int = MAX_CLASSES) -> list[int]:
    """Labels whose rows are shown: all in their order if a set has few, else the worst half of `limit`, then the best half, worst first.

    Args:
        per_class: `EvaluationResult.per_class`; without scores in it the first labels are taken.
        labels: of the images at hand, [N].
    """
    present = {int(label) for label in np.unique(labels)}
    ranked = [label for label in _ranks(per_class, limit) if label in present] or sorted(present)
    if len(ranked) <= limit:
        return ranked
    return ranked[: limit // 2] + ranked[len(ranked) - (limit - limit // 2) :] if _ranks(per_class, limit) else ranked[:limit]


def _ranks(per_class: Sequence[dict[str, Any]] | None, limit: int = MAX_CLASSES) -> list[int]:
    """Labels from the worst to the best by precision, else accuracy, else FID; empty if there are at most `limit`, or no scores."""
    for key, sign in (("precision", 1), ("class_accuracy", 1), ("fid", -1)):
        ranked = sorted((sign * row[key], row["label"]) for row in per_class or () if row.get(key) is not None)
        if len(ranked) > limit:
            return [label for _, label in ranked]
    return []


def _class_name(labels: np.ndarray | None, label_names: Sequence[str] | None, index: int) -> str:
    if labels is None:
        return f"image {index}"
    label = int(labels[index])
    return label_names[label] if label_names is not None and 0 <= label < len(label_names) else f"class {label}"


def _class_facts(row: dict[str, Any] | None) -> str:
    """`precision 0.71, FID 40.12, 50 images`"""
    if row is None:
        return ""
    scores = [
        f"{SCORE_OF[key].title} {score_number(key, row[key], short=True)}"
        for key in ("precision", "class_accuracy", "fid")
        if row.get(key) is not None
    ]
    return ", ".join([*scores, f"{row['num']:,} images"])


def _class_table(rows: list[dict[str, Any]]) -> str:
    """Numbers of all classes, folded if there are many."""
    keys = [key for key in ("precision", "class_accuracy", "fid") if any(row.get(key) is not None for row in rows)]
    heads = "".join(f'<th class="num">{escape(title)}</th>' for title in ("images", *(SCORE_OF[key].title for key in keys)))
    lines = []
    for row in rows:
        cells = [f"{row['num']:,}", *("-" if row.get(key) is None else score_number(key, row[key], short=True) for key in keys)]
        lines.append(f"<tr><th>{escape(row['name'])}</th>{''.join(f'<td class=num>{escape(cell)}</td>' for cell in cells)}</tr>")
    table = f'<div class="scroll"><table><thead><tr><th>class</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return table if len(rows) <= MAX_CLASSES else f"<details><summary>All {len(rows):,} classes</summary>{table}</details>"
