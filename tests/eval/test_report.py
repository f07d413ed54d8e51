import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from genvision.eval.job import EvaluationResult, score_arrays
from genvision.eval.reconstruction import ReconstructionResult
from genvision.eval.report import format_table, to_json, write_json

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def result(digits_first, digits_second) -> EvaluationResult:
    images, labels = digits_first
    return score_arrays(images[:40], labels[:40], digits_second[0], name="forty digits")


def test_json_has_every_key_and_plain_values(result):
    content = json.loads(to_json(result))
    assert list(content) == [field.name for field in fields(EvaluationResult)]
    assert content["fid"] == result.fid
    assert content["num_generated"] == 40
    assert content["versions"]["torch-fidelity"]
    assert len(content["warnings"]) == 1


def test_what_was_not_measured_or_is_not_finite_is_null(result):
    content = json.loads(to_json(replace(result, fid=None, inception_score=float("inf"))))
    assert content["fid"] is None
    assert content["inception_score"] is None


def test_file_appears_whole_and_alone(result, tmp_path):
    write_json(result, tmp_path / "new" / "scores.json")
    assert (tmp_path / "new" / "scores.json").read_text() == to_json(result)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]


def test_table_is_aligned_and_shows_scores_counts_and_warnings(result):
    lines = format_table(result).splitlines()
    assert lines[0].split() == ["FID", f"{result.fid:.4f}"]
    values = [line for line in lines if line and not line.startswith("warning: ")]
    column = lines[0].index(lines[0].split()[1])
    assert all(line[column - 1] == " " and line[column] != " " for line in values)
    assert any(line.split() == ["num", "generated", "40"] for line in lines)
    assert lines[-1] == f"warning: {result.warnings[0]}"
    assert "FID" not in format_table(replace(result, fid=None, warnings=[]))


@pytest.mark.parametrize("kind", [EvaluationResult, ReconstructionResult])
def test_every_key_is_documented(kind):
    documented = DOCS.read_text()
    assert [field.name for field in fields(kind) if f"`{field.name}`" not in documented] == []
