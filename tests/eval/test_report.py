import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from result_examples import FULL, changed

from genvision.eval.classification_accuracy import CASResult
from genvision.eval.neighbours import NeighboursResult
from genvision.eval.probe import ProbeResult
from genvision.eval.reconstruction import ReconstructionResult
from genvision.eval.report import SCORES, format_table, report_sentence, score_number, to_json, write_json, write_text
from genvision.eval.result import EvaluationResult

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_json_has_every_key_and_plain_values():
    content = json.loads(to_json(FULL))
    assert list(content) == [field.name for field in fields(EvaluationResult)]
    assert content["fid"] == FULL.fid
    assert content["fid_interval"] == [3.9012, 3.9848]
    assert content["fid_curve"][0] == [5000, 4.6911]


def test_what_was_not_measured_or_is_not_finite_is_null():
    infinite = changed(
        fid=None,
        inception_score=float("inf"),
        fid_interval=(1.0, float("nan")),
        fid_curve=[(2, float("nan")), (4, 1.0)],
        sampling={"cfg": np.nan},
    )
    content = json.loads(to_json(infinite))
    assert content["fid"] is None
    assert content["inception_score"] is None
    assert content["fid_interval"] is None
    assert content["fid_curve"] == [[4, 1.0]]
    assert content["sampling"] == {"cfg": None}


def test_numbers_of_numpy_become_plain_ones():
    content = json.loads(to_json(changed(fid=np.float32(2.5), num_generated=np.int64(7), sampling={"prefix": [np.int64(1), None]})))
    assert (content["fid"], content["num_generated"], content["sampling"]) == (2.5, 7, {"prefix": [1, None]})


def test_file_appears_whole_and_alone(tmp_path):
    write_json(FULL, tmp_path / "new" / "scores.json")
    assert (tmp_path / "new" / "scores.json").read_text(encoding="utf-8") == to_json(FULL)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"


def test_table_shows_scores_with_intervals_then_facts_then_notes_and_warnings():
    lines = format_table(FULL).splitlines()
    assert lines[0].split() == ["FID", "3.9431", "[3.9012,", "3.9848]"]
    assert any(line.split() == ["num", "generated", "50,000"] for line in lines)
    assert any(line.split() == ["sampling", "sampler", "guidance", "scale", "1.5"] for line in lines)
    assert lines[-3:] == [
        "depends on the order of images: inception_score",
        "note: Inception Score is in ADM's form",
        "warning: samples look sorted by class",
    ]
    assert "3.9431  [" not in format_table(changed(fid_interval=None))


def test_table_is_aligned():
    lines = format_table(changed(order_sensitive=[], notes=[], warnings=[])).splitlines()
    column = lines[0].index("3.9431")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines if line)
    starts = {line.index("[") for line in lines[: lines.index("")] if "[" in line}
    assert len(starts) == 1


def test_hashes_are_shortened_and_what_was_not_measured_is_left_out():
    table = format_table(changed(recall=None))
    assert "9f2c9f2c9f2c\n" in table and "9f2c" * 4 not in table
    assert "recall" not in table


@pytest.mark.parametrize(("value", "text"), [(-4e-13, "0.00"), (0.0, "0.00"), (-0.004, "0.00"), (-0.006, "-0.01"), (3.945001, "3.95")])
def test_a_score_a_hair_below_zero_has_no_minus(value, text):
    assert score_number("fid", value, short=True) == text


@pytest.mark.parametrize("kind", [EvaluationResult, ReconstructionResult])
def test_every_score_that_has_an_interval_can_be_written(kind):
    names = {field.name for field in fields(kind)}
    with_interval = {name for name in names if f"{name}_interval" in names}
    assert with_interval and with_interval <= {score.key for score in SCORES}


def test_sentence_for_a_paper_names_what_the_scores_depend_on():
    sentence = report_sentence(FULL)
    for part in (
        "FID 3.94 [3.90, 3.98]",
        "sFID 6.14",
        "protocol adm",
        "50,000 images of 256x256 pixels",
        "labels: balanced",
        "imagenet256.npz (stored statistics, sha256 ab31ab31ab31)",
        "weights sha256 6726825d6726",
        "MaskedSampler with guidance_scale 1.5",
        "24 network calls",
        "genvision 0.2.0",
    ):
        assert part in sentence
    assert sentence.endswith(".") and "\n" not in sentence and "None" not in sentence
    assert "3.87" not in sentence, "a corrected FID must not get into a paper by accident"


def test_sentence_leaves_out_what_is_not_known():
    bare = changed(
        sampling=None, reference=None, reference_hash=None, fid=None, sfid=None, precision=None, recall=None, kid=None, versions={}
    )
    sentence = report_sentence(bare)
    assert sentence.startswith("Inception Score 215.8 (protocol adm;")
    assert "reference" not in sentence and "None" not in sentence and "intervals" not in sentence


@pytest.mark.parametrize("kind", [EvaluationResult, ReconstructionResult, CASResult, ProbeResult, NeighboursResult])
def test_every_key_is_documented(kind):
    documented = DOCS.read_text()
    assert [field.name for field in fields(kind) if f"`{field.name}`" not in documented] == []
