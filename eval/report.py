"""Results as JSON (keys: docs/evaluation.md) and as a table for the terminal."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genvision.eval.job import EvaluationResult
    from genvision.eval.reconstruction import ReconstructionResult

    Result = EvaluationResult | ReconstructionResult

# key of the result, what the table calls it, how its value is written
SCORES = (
    ("fid", "FID", "{:.4f}"),
    ("rfid", "rFID", "{:.4f}"),
    ("inception_score", "Inception Score", "{:.4f}"),
    ("inception_score_std", "  deviation over splits", "{:.4f}"),
    ("class_accuracy", "class accuracy", "{:.2%}"),
    ("psnr", "PSNR (dB)", "{:.3f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("ssim_range2", "SSIM (range 2)", "{:.4f}"),
    ("codebook_usage", "codebook usage", "{:.2%}"),
    ("codebook_perplexity", "codebook perplexity", "{:.1f}"),
)


def to_json(result: "Result") -> str:
    """The result as a JSON object, every key present; null where something was not measured or is not finite."""
    content = {key: _finite(value) for key, value in dataclasses.asdict(result).items()}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(result: "Result", path: Path) -> None:
    """Write `to_json` so that no half-written file ever bears the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(to_json(result), encoding="utf-8")
    part.replace(path)


def format_table(result: "Result") -> str:
    """Aligned lines: first the scores that were measured, then what they depend on, then the warnings."""
    content = dataclasses.asdict(result)
    shown = {key for key, _, _ in SCORES}
    rows = [(title, form.format(content[key])) for key, title, form in SCORES if content.get(key) is not None]
    rows.append(("", ""))
    for key, value in content.items():
        if key in shown or key in ("versions", "warnings") or value is None:
            continue
        rows.append((key.replace("_", " "), _shorten_hash(key, str(value))))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())))
    width = max(len(title) for title, _ in rows)
    lines = [f"{title:<{width}}  {value}".rstrip() for title, value in rows]
    return "\n".join([*lines, *(f"warning: {line}" for line in content["warnings"])])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shorten_hash(key: str, value: str) -> str:
    return value[:12] if key.endswith(("_hash", "_fingerprint")) else value
