import json
from dataclasses import fields
from pathlib import Path

import pytest
from result_examples import FULL, changed

from genvision.errors import UserError
from genvision.eval.report import to_content, to_json, write_json
from genvision.eval.result import EvaluationResult, read_result, result_schema, validate


@pytest.fixture
def content():
    return to_content(FULL)


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path):
    for result in (FULL, changed(fid_curve=None, fid_interval=None, per_class=None, sampling=None, order_sensitive=[])):
        write_json(result, tmp_path / "results.json")
        assert read_result(tmp_path / "results.json") == result


def test_schema_names_every_key_as_required_and_allows_no_other():
    schema = result_schema()
    names = [entry.name for entry in fields(EvaluationResult)]
    assert list(schema["properties"]) == schema["required"] == names
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("fid", {"type": ["number", "null"]}),
        ("num_generated", {"type": "integer"}),
        ("kind", {"enum": ["evaluate", "fid"]}),
        ("schema", {"const": "genvision.evaluation/1"}),
        ("versions", {"type": "object", "additionalProperties": {"type": "string"}}),
        ("order_sensitive", {"type": "array", "items": {"type": "string"}}),
    ],
)
def test_schema_says_in_json_what_the_annotation_says(key, expected):
    assert result_schema()["properties"][key] == expected


def test_schema_of_an_interval_is_two_numbers_or_null():
    pair = {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "minItems": 2, "maxItems": 2}
    assert result_schema()["properties"]["fid_interval"] == {"anyOf": [pair, {"type": "null"}]}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("fid", "3.94", "key 'fid' should be number or null, got \"3.94\""),
        ("fid", True, "key 'fid' should be number or null, got true"),
        ("num_generated", 5.5, "key 'num_generated' should be integer, got 5.5"),
        ("num_generated", None, "key 'num_generated' should be integer, got null"),
        ("kind", "train", "key 'kind' should be 'evaluate' or 'fid', got \"train\""),
        ("fid_interval", [3.9], "key 'fid_interval'"),
        ("fid_interval", [3.9, "4"], "key 'fid_interval[1]' should be number, got \"4\""),
        ("fid_curve", [[5000, 4.7], [10000.5, 4.2]], "key 'fid_curve[1][0]' should be integer, got 10000.5"),
        ("per_class", [3], "key 'per_class[0]' should be object, got 3"),
        ("versions", {"torch": 2}, "key 'versions.torch' should be string, got 2"),
        ("warnings", "none", "key 'warnings' should be array, got \"none\""),
    ],
)
def test_a_value_of_another_type_is_refused_with_file_and_key(content, key, value, complaint):
    content[key] = value
    with pytest.raises(UserError) as caught:
        validate(content, "a.json")
    message = str(caught.value)
    assert message.startswith(f"a.json: {complaint}") and "\n" not in message


def test_whole_numbers_serve_where_numbers_are_expected(content):
    content["fid"], content["fid_interval"] = 4, [3, 5]
    validate(content)


def test_a_missing_an_unknown_key_and_another_version_are_named(content):
    for change, complaint in (
        (lambda c: c.pop("recall"), "key 'recall' is missing"),
        (lambda c: c.update(fids=1), "key 'fids' is unknown"),
        (lambda c: c.update(schema="genvision.evaluation/9"), "'genvision.evaluation/1'"),
        (lambda c: c.pop("schema"), "key 'schema' is missing"),
    ):
        broken = dict(content)
        change(broken)
        with pytest.raises(UserError, match=r"^a\.json: ") as caught:
            validate(broken, "a.json")
        assert complaint in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"fid": NaN}', '{"fid": 1, "fid": 2}', "[" * 100_000, '"\\ud800"'])
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_result(tmp_path / "a.json")
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_a_folder_and_nothing_are_refused_in_one_line(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.json", ".", "missing.json"):
        with pytest.raises(UserError) as caught:
            read_result(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_number_that_was_not_finite_reads_back_as_not_measured(tmp_path):
    write_json(changed(fid=float("nan"), fid_interval=(float("-inf"), float("inf"))), tmp_path / "a.json")
    result = read_result(tmp_path / "a.json")
    assert result.fid is None and result.fid_interval is None


def test_what_is_written_is_valid_whatever_was_measured():
    nothing = EvaluationResult(
        protocol="adm",
        num_generated=2,
        generated="a",
        generated_hash="b",
        labels="none",
        order="as given",
        image_size=8,
        crop="none",
        extractor="digits",
        extractor_hash="c",
        resize="none",
        feature_dim=64,
        batch_size=1,
        device="cpu",
        seconds=0.5,
    )
    for result in (FULL, nothing):
        validate(json.loads(to_json(result)))


def test_the_published_schema_is_the_one_in_force():
    published = json.loads((Path(__file__).parents[2] / "docs" / "evaluation.schema.json").read_text())
    assert published == result_schema()
