"""The result of an evaluation: one flat record with everything that can move its numbers. docs/evaluation.md explains every key.

Every key is always there; null (None) means that it was not measured. `schema` changes only when a key changes its meaning or goes.

The file is JSON; `result_schema` describes it for other programs (JSON Schema, draft 2020-12) and is what `validate` goes by.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from genvision.errors import UserError

Interval = tuple[float, float]
SCHEMA = "genvision.evaluation/1"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores of one set, how sure they are, and what they depend on."""

    schema: str = SCHEMA
    kind: Literal["evaluate", "fid"] = "evaluate"
    protocol: str

    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    f_score: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    fd_dinov2: float | None = None
    class_accuracy: float | None = None

    fid_interval: Interval | None = None
    sfid_interval: Interval | None = None
    fd_dinov2_interval: Interval | None = None
    precision_interval: Interval | None = None
    recall_interval: Interval | None = None
    kid_interval: Interval | None = None
    class_accuracy_interval: Interval | None = None
    fid_bias: float | None = None
    fid_debiased: float | None = None
    fid_infinity: float | None = None
    fid_infinity_interval: Interval | None = None
    fid_curve: list[tuple[int, float]] | None = None
    interval_method: str | None = None

    per_class: list[dict[str, Any]] | None = None
    order_sensitive: list[str] = field(default_factory=list)

    num_generated: int
    num_reference: int | None = None
    num_reference_statistics: int | None = None
    generated: str
    generated_hash: str
    generated_formats: dict[str, int] = field(default_factory=dict)
    num_duplicates: int | None = None
    reference: str | None = None
    reference_hash: str | None = None
    reference_origin: str | None = None
    reference_cached: bool | None = None
    labels: str
    order: str
    image_size: int
    crop: str

    extractor: str
    extractor_hash: str
    resize: str
    feature_dim: int
    dinov2_hash: str | None = None
    judge_hash: str | None = None
    is_estimator: str | None = None
    is_splits: int | None = None
    is_block_size: int | None = None
    is_shuffle_seed: int | None = None
    kid_estimator: str | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    kid_seed: int | None = None
    pr_k: int | None = None
    pr_mode: str | None = None
    feature_dtype: str = "float32"
    statistics_dtype: str = "float64"

    model: str | None = None
    sampling: dict[str, Any] | None = None
    num_processes: int = 1
    batch_size: int
    device: str
    seconds: float
    images_per_second: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def result_schema(kind: type = EvaluationResult) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a result file.

    Args:
        kind: dataclass of the result, with a field `schema` that names its version.
    """
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind)]
    properties = {name: _schema_of(hints[name], is_top=True) for name in names}
    [version] = [entry.default for entry in fields(kind) if entry.name == "schema"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": version,
        "description": (kind.__doc__ or "").splitlines()[0],
        "type": "object",
        "properties": {**properties, "schema": {"const": version}},
        "required": names,
        "additionalProperties": False,
    }


def validate(content: Any, source: str = "result", kind: type = EvaluationResult) -> None:
    """Refuse what is no result of this version.

    Args:
        content: what the JSON file holds.
        source: what to call it in the message.
        kind: see `result_schema`.

    Raises:
        UserError: names the first key that is missing, unknown or of another type.
    """
    schema = result_schema(kind)
    if not isinstance(content, dict):
        raise UserError(f"{source}: a result is a JSON object, got {_describe(content)}; give a file of `genvision evaluate --json`")
    version = schema["properties"]["schema"]["const"]
    if "schema" not in content:
        raise UserError(f"{source}: key 'schema' is missing, so this is no result of this version; evaluate again to get a '{version}'")
    if content["schema"] != version:
        raise UserError(
            f"{source}: key 'schema' is {_describe(content['schema'])}, expected '{version}'; "
            "read it with the version of genvision that wrote it, or evaluate again"
        )
    for key in content:
        if key not in schema["properties"]:
            raise UserError(f"{source}: key '{key}' is unknown in '{version}'; remove it, or read it with the version that wrote it")
    for key in schema["required"]:
        if key not in content:
            raise UserError(f"{source}: key '{key}' is missing; evaluate again (null stands for what was not measured)")
    for key, value in content.items():
        problem = _problem(value, schema["properties"][key], key)
        if problem:
            raise UserError(f"{source}: {problem}; the file was edited or damaged, evaluate again")


def read_content(path: Path) -> Any:
    """The JSON of a file, unchecked.

    Raises:
        UserError: there is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a result file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error}); give the file that `genvision evaluate --json` wrote") from error


def read_result(path: Path) -> EvaluationResult:
    """The result in a file that `genvision.eval.report.write_json` wrote.

    Raises:
        UserError: there is no such file, or it is no result of this version.
    """
    content = read_content(path)
    validate(content, str(path))
    return EvaluationResult(**{key: _with_pairs(value) if _holds_pairs(key) else value for key, value in content.items()})


def _schema_of(kind: Any, *, is_top: bool = False) -> dict[str, Any]:
    """Schema of a value; a number directly in the result may be null, since what is not finite is written so."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind is float and is_top:
        return _schema_of(float | None)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        parts = [_schema_of(part) for part in arguments]
        if all(part.keys() == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts]}
        return {"anyOf": parts}
    if origin is tuple:
        parts = [_schema_of(part) for part in arguments]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if origin is list:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    return {"type": {str: "string", bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}[kind]}


def _problem(value: Any, schema: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with a value by the part of JSON Schema that `_schema_of` writes; None if nothing is."""
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return None if value in allowed else f"key '{key}' should be {' or '.join(map(repr, allowed))}, got {_describe(value)}"
    if "anyOf" in schema:
        problems = [_problem(value, part, key) for part in schema["anyOf"]]
        if None in problems:
            return None
        # the deeper complaint says more than that a list is not null
        return next((text for text in problems if text and f"key '{key}'" not in text), problems[0])
    if "type" not in schema:
        return None
    allowed = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(_is_a(value, name) for name in allowed):
        return f"key '{key}' should be {' or '.join(allowed)}, got {_describe(value)}"
    if isinstance(value, list):
        expected = schema.get("prefixItems") or [schema["items"]] * len(value)
        if len(value) != len(expected):
            return f"key '{key}' should hold {len(expected)} values, got {len(value)}"
        inner = [(f"{key}[{i}]", item, part) for i, (item, part) in enumerate(zip(value, expected, strict=True))]
    elif isinstance(value, dict):
        inner = [(f"{key}.{name}", item, schema["additionalProperties"]) for name, item in value.items()]
    else:
        return None
    return next((text for name, item, part in inner if (text := _problem(item, part, name))), None)


def _is_a(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    kinds = {"string": str, "integer": int, "number": int | float, "null": types.NoneType, "array": list, "object": dict, "boolean": bool}
    return isinstance(value, kinds[name])


def _describe(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _holds_pairs(key: str) -> bool:
    return key == "fid_curve" or key.endswith("_interval")


def _with_pairs(value: Any) -> Any:
    """Lists of two numbers back to tuples."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [tuple(pair) for pair in value]
    return tuple(value) if isinstance(value, list) and value else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content
