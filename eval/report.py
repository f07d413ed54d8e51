"""Results as JSON (keys: docs/evaluation.md), as a table for the terminal, and as the sentence that a paper needs.

Works on every result of this package: a flat dataclass whose intervals stand beside their scores as `<score>_interval`.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as Result

    from genvision.eval.result import EvaluationResult


class Score(NamedTuple):
    """How a score is written."""

    key: str
    title: str
    form: str
    """With all digits that two runs of one evaluation share."""
    short_form: str
    """With the digits that papers give."""
    better: Literal["lower", "higher", ""]


SCORES = (
    Score("fid", "FID", "{:.4f}", "{:.2f}", "lower"),
    Score("rfid", "rFID", "{:.4f}", "{:.2f}", "lower"),
    Score("sfid", "sFID", "{:.4f}", "{:.2f}", "lower"),
    Score("fd_dinov2", "FD-DINOv2", "{:.4f}", "{:.2f}", "lower"),
    Score("inception_score", "Inception Score", "{:.4f}", "{:.1f}", "higher"),
    Score("inception_score_std", "  deviation over splits", "{:.4f}", "{:.1f}", ""),
    Score("precision", "precision", "{:.4f}", "{:.3f}", "higher"),
    Score("recall", "recall", "{:.4f}", "{:.3f}", "higher"),
    Score("f_score", "F score", "{:.4f}", "{:.3f}", "higher"),
    Score("kid", "KID", "{:.6f}", "{:.5f}", "lower"),
    Score("kid_std", "  deviation over subsets", "{:.6f}", "{:.5f}", ""),
    Score("class_accuracy", "class accuracy", "{:.2%}", "{:.1%}", "higher"),
    Score("fid_infinity", "FID-infinity", "{:.4f}", "{:.2f}", "lower"),
    Score("fid_debiased", "FID debiased", "{:.4f}", "{:.2f}", "lower"),
    Score("fid_bias", "  bias of FID", "{:.4f}", "{:.3f}", ""),
    Score("psnr", "PSNR (dB)", "{:.3f}", "{:.2f}", "higher"),
    Score("ssim", "SSIM", "{:.4f}", "{:.3f}", "higher"),
    Score("ssim_range2", "SSIM (range 2)", "{:.4f}", "{:.3f}", "higher"),
    Score("lpips", "LPIPS", "{:.4f}", "{:.3f}", "lower"),
    Score("perceptual", "perceptual distance", "{:.4f}", "{:.3f}", "lower"),
    Score("codebook_usage", "codebook usage", "{:.2%}", "{:.1%}", "higher"),
    Score("codebook_perplexity", "codebook perplexity", "{:.1f}", "{:.0f}", "higher"),
    Score("codebook_entropy", "codebook entropy (bits)", "{:.3f}", "{:.2f}", "higher"),
)
SCORE_OF = {score.key: score for score in SCORES}
NOT_FIELDS = {"notes", "warnings", "per_class", "fid_curve"}
"""Keys that are shown in ways of their own."""
_UPPER = {"is": "IS", "kid": "KID", "pr": "P/R", "fid": "FID", "lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM", "dinov2": "DINOv2"}


def to_json(result: "Result") -> str:
    """The result as a JSON object, every key present; null where something was not measured or is not finite."""
    return json.dumps(_plain(dataclasses.asdict(result)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(result: "Result", path: Path) -> None:
    """Write `to_json` so that no half-written file ever bears the name `path`."""
    write_text(path, to_json(result))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 so that no half-written file ever bears the name `path`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def to_content(result: "Result") -> dict[str, Any]:
    """What the JSON file holds, as plain values."""
    content: dict[str, Any] = json.loads(to_json(result))
    return content


def format_table(result: "Result") -> str:
    """Aligned lines: the scores that were measured with their intervals, what they depend on, notes and warnings."""
    content = to_content(result)
    scores = [(score.title, score_text(content, score.key)) for score in SCORES if content.get(score.key) is not None]
    width = max(len(value.split("  ")[0]) for _, value in scores) if scores else 0
    scores = [(title, "  ".join([value.split("  ")[0].ljust(width), *value.split("  ")[1:]])) for title, value in scores]
    rows = [*scores, ("", "")]
    for key, value in flatten(content).items():
        if not is_score_key(key) and key.split(".")[0] not in {*NOT_FIELDS, "versions", "order_sensitive"} and value is not None:
            rows.append((field_title(key), value_text(key, value)))
    for name in ("per_class", "fid_curve"):
        if content.get(name):
            rows.append((field_title(name), _summary(name, content[name])))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())))
    column = max(len(title) for title, _ in rows)
    lines = [f"{title:<{column}}  {value}".rstrip() for title, value in rows]
    if content.get("order_sensitive"):
        lines.append(f"depends on the order of images: {', '.join(content['order_sensitive'])}")
    lines += [f"note: {line}" for line in content.get("notes", [])]
    return "\n".join([*lines, *(f"warning: {line}" for line in content["warnings"])])


def score_text(content: Mapping[str, Any], key: str, *, short: bool = False) -> str:
    """`3.9430  [3.9012, 3.9848]`: a score that was measured, two spaces, and its interval if it has one."""
    interval = content.get(f"{key}_interval")
    number = score_number(key, content[key], short=short)
    return number if interval is None else f"{number}  {interval_text(key, interval, short=short)}"


def score_number(key: str, value: float, *, short: bool = False) -> str:
    """One number in the digits of a score."""
    score = SCORE_OF[key]
    text = (score.short_form if short else score.form).format(value)
    return text[1:] if re.fullmatch(r"-[0.]+%?", text) else text  # equal sets can score a hair below 0


def interval_text(key: str, interval: tuple[float, float] | list[float], *, short: bool = False) -> str:
    """`[3.90, 3.98]`"""
    return f"[{', '.join(score_number(key, bound, short=short) for bound in interval)}]"


def report_sentence(result: "EvaluationResult") -> str:
    """One sentence for a paper: the scores and what they depend on."""
    content = to_content(result)
    named = [score for score in SCORES if score.better and content.get(score.key) is not None and not score.key.startswith("fid_")]
    scores = [f"{score.title} {score_text(content, score.key, short=True).replace('  ', ' ')}" for score in named]
    size = f"{result.image_size}x{result.image_size}"
    images = [f"{result.num_generated:,} images of {size} pixels", f"labels: {result.labels}"]
    if result.crop != "none":
        images.append(result.crop)
    if "inception_score" in content and result.inception_score is not None and result.is_splits:
        images.append(f"Inception Score over {result.is_splits} splits ({result.is_estimator or 'estimator not stated'})")
    if (result.precision is not None or result.recall is not None) and result.pr_k:
        images.append(f"precision and recall with k = {result.pr_k} (mode {result.pr_mode or 'not stated'})")
    facts = [f"protocol {result.protocol}", *images]
    if result.reference is not None:
        digest = f", sha256 {result.reference_hash[:12]}" if result.reference_hash else ""
        facts.append(f"reference {result.reference} ({result.reference_origin or 'images'}{digest})")
    facts.append(f"features of {result.extractor} (weights sha256 {result.extractor_hash[:12]}), resize {result.resize}")
    facts += _sampling_facts(content.get("sampling") or {})
    if any(content.get(f"{score.key}_interval") for score in named) and result.interval_method:
        facts.append(f"intervals: {result.interval_method}")
    if "genvision" in result.versions:
        facts.append(f"genvision {result.versions['genvision']}")
    return f"{', '.join(scores) or 'No score was measured'} ({'; '.join(facts)})."


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as `outer.inner` keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_score_key(key: str) -> bool:
    """Whether a key is a score, or the interval of one."""
    return key in SCORE_OF or key.removesuffix("_interval") in SCORE_OF


def field_title(key: str) -> str:
    """What people call a key: `is_splits` becomes `IS splits`."""
    words = re.split(r"[_.]", key)
    return " ".join(_UPPER.get(word, word) for word in words)


def value_text(key: str, value: Any) -> str:
    """A fact in one line: counts with commas, hashes cut to twelve digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "seed" not in key:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(value_text(key, item) for item in value[:8])
        return f"{shown}, ... ({len(value):,} in all)" if len(value) > 8 else shown or "none"
    text = " ".join(str(value).split())
    return text[:12] if key.endswith(("_hash", "_fingerprint")) else text


def _sampling_facts(sampling: Mapping[str, Any]) -> list[str]:
    """The sampler with its options, in words."""
    sampler = sampling.get("sampler")
    facts = []
    if isinstance(sampler, Mapping):
        chosen = {key: value for key, value in flatten(sampler).items() if key != "name" and value is not None}
        options = ", ".join(f"{key} {value_text(key, value)}" for key, value in chosen.items())
        facts.append(f"drawn by {sampler.get('name', 'the sampler')}" + (f" with {options}" if options else ""))
    if isinstance(sampling.get("network_calls"), int | float):
        facts.append(f"{sampling['network_calls']:,} network calls an image")
    return facts


def _summary(name: str, rows: list[Any]) -> str:
    if name == "fid_curve":
        return ", ".join(f"{value:.4f} at {count:,}" for count, value in rows)
    return f"{len(rows):,} classes"


def _plain(value: Any) -> Any:
    """Values that JSON has; what is not finite becomes null, and a pair with such a number null as a whole."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        return None if None in items else items
    if isinstance(value, list):
        return [plain for item in value if (plain := _plain(item)) is not None or not isinstance(item, tuple)]
    return value
