from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from result_examples import FULL, changed

from genvision.errors import UserError
from genvision.eval.comparability import RULES, find_obstacles
from genvision.eval.compare import compare, compare_contents, format_comparison, short_names, write_comparison_page
from genvision.eval.reconstruction import ReconstructionResult
from genvision.eval.report import SCORES, to_content, write_json
from genvision.eval.result import EvaluationResult

BETTER = changed(
    fid=3.561,
    fid_interval=(3.5221, 3.5999),
    precision=0.8281,
    precision_interval=(0.8247, 0.8315),
    recall=0.51,
    generated_hash="5c1d" * 16,
    sampling={"seed": 0, "rounding": "trunc127.5", "sampler": {"name": "MaskedSampler", "guidance_scale": 1.75}, "network_calls": 24},
    seconds=2000.0,
)


def together(*results: Any):
    return compare_contents([chr(ord("a") + i) for i in range(len(results))], [to_content(result) for result in results])


def reconstruction(**values: Any) -> ReconstructionResult:
    """A result of `reconstruct` with invented facts where it has no defaults."""
    invented = {"int": 256, "float": 20.5, "str": "abc"}
    needed = {
        field.name: invented[getattr(field.type, "__name__", str(field.type))]
        for field in fields(ReconstructionResult)
        if field.default is MISSING and field.default_factory is MISSING
    }
    return ReconstructionResult(**{**needed, **values})


def test_differences_are_to_the_first_and_say_which_way_is_better():
    first, second = together(FULL, BETTER).scores["fid"]
    assert first.difference is None and first.interval == (3.9012, 3.9848)
    assert second.difference == pytest.approx(-0.3821) and second.overlaps is False and second.broken_by == ()
    text = format_comparison(together(FULL, BETTER))
    assert "-0.3821 better, intervals apart" in text
    assert "+0.0016 better, intervals overlap" in text
    assert "-0.0209 worse\n" in text
    assert "no test" in text


def test_intervals_that_touch_overlap_and_a_missing_one_says_nothing():
    touching = together(changed(fid_interval=(3.0, 4.0)), changed(fid=4.5, fid_interval=(4.0, 5.0))).scores["fid"][1]
    assert touching.overlaps is True
    assert together(FULL, changed(fid_interval=None)).scores["fid"][1].overlaps is None
    assert "no test" not in format_comparison(
        together(*[changed(fid_interval=None, precision_interval=None, kid_interval=None, fid_infinity_interval=None)] * 2)
    )


def test_facts_that_differ_are_marked_and_the_others_folded():
    comparison = together(FULL, BETTER)
    assert list(comparison.differing) == ["generated_hash", "sampling.sampler.guidance_scale", "seconds"]
    assert comparison.differing["sampling.sampler.guidance_scale"] == [1.5, 1.75]
    assert comparison.equal["protocol"] == "adm" and comparison.equal["versions.torch"] == "2.14.1"
    lines = format_comparison(comparison).splitlines()
    assert [line.split()[0] for line in lines if "1.75" in line] == ["*"]
    assert [line.split()[0] for line in lines if "2000" in line] == ["seconds"], "time moves no score"
    assert sum("protocol adm" in line for line in lines) == 1
    assert comparison.differing.keys().isdisjoint(comparison.equal)


def test_equal_results_have_no_obstacle_and_nothing_that_differs():
    comparison = together(FULL, FULL, FULL)
    assert comparison.obstacles == [] and comparison.differing == {}
    assert all(not cell.difference and not cell.broken_by for cells in comparison.scores.values() for cell in cells)


@pytest.mark.parametrize(
    ("change", "broken", "whole"),
    [
        ({"protocol": "clean"}, {"fid", "kid", "inception_score", "precision"}, set()),
        ({"num_generated": 10000}, {"fid", "sfid", "inception_score", "precision", "recall"}, {"kid", "fid_infinity"}),
        ({"reference_hash": "ff" * 32}, {"fid", "kid", "precision", "fid_infinity"}, {"inception_score"}),
        ({"reference": "the same file elsewhere.npz"}, set(), {"fid", "kid"}),
        ({"resize": "bicubic"}, {"fid", "inception_score", "kid"}, set()),
        ({"extractor_hash": "ff" * 32}, {"fid", "inception_score", "kid"}, set()),
        ({"is_block_size": 10000}, {"inception_score"}, {"fid", "precision"}),
        ({"pr_mode": "float32"}, {"precision", "recall"}, {"fid", "inception_score"}),
        ({"num_reference": 50000}, {"precision", "recall"}, {"fid", "inception_score"}),
        ({"image_size": 512}, {"fid", "inception_score", "precision"}, set()),
        ({"num_generated": 49990, "num_reference": 9999}, set(), {"fid", "precision"}),
        ({"generated_formats": {"PNG": 7}}, set(), {"fid", "inception_score"}),
        ({"labels": "random"}, set(), {"fid", "inception_score"}),
        ({"device": "cpu", "batch_size": 8, "num_processes": 1}, set(), {"fid", "inception_score", "kid"}),
    ],
)
def test_only_the_scores_that_a_fact_moves_are_said_not_to_be_comparable(change, broken, whole):
    comparison = together(FULL, changed(**change))
    for key in broken:
        assert set(change) & set(comparison.scores[key][1].broken_by), key
    for key in whole:
        assert comparison.scores[key][1].broken_by == (), key
    text = format_comparison(comparison)
    assert (text.splitlines()[0].startswith("not comparable: ")) == bool(broken)


def test_a_fact_of_a_score_that_only_one_has_is_no_obstacle():
    without = changed(inception_score=None, is_splits=None, is_estimator=None, is_block_size=None)
    assert find_obstacles([to_content(FULL), to_content(without)]) == []


def test_labels_rounding_and_jpeg_call_for_care():
    careful = changed(labels="random", generated_formats={"JPEG": 3}, sampling={**FULL.sampling, "rounding": "trunc255"})
    comparison = together(FULL, careful)
    assert {obstacle.rule.key for obstacle in comparison.obstacles} == {"labels", "generated_formats", "sampling.rounding"}
    assert format_comparison(comparison).splitlines()[0].startswith("compare with care: FID, ")


def test_files_without_loss_are_alike_whatever_their_number_and_kind():
    results = changed(generated_formats={"PNG": 10}), changed(generated_formats={"array": 50000}), changed(generated_formats={})
    assert together(*results).obstacles == []
    [obstacle] = together(FULL, changed(generated_formats={"PNG": 30, "JPEG": 10})).obstacles
    assert obstacle.values == ("lossless", "25% JPEG or WEBP")


def test_a_broken_comparison_is_never_called_better_or_worse():
    text = format_comparison(together(FULL, changed(fid=2.0, fid_interval=(1.9, 2.1), protocol="clean")))
    assert " better" not in text and " worse" not in text and text.count("not comparable") > 1


def test_the_line_of_an_obstacle_names_scores_fact_values_and_reason():
    [obstacle] = find_obstacles([to_content(FULL), to_content(changed(num_generated=10000))])
    assert obstacle.line.startswith("FID, sFID, Inception Score, precision, recall: num generated is 50,000 / 10,000 (")


def test_rules_speak_of_facts_and_scores_that_exist():
    facts = {field.name for kind in (EvaluationResult, ReconstructionResult) for field in fields(kind)} | {"data_hash"}
    scores = {score.key for score in SCORES}
    for rule in RULES:
        assert rule.key.split(".")[0] in facts, rule.key
        assert rule.scores and rule.scores <= scores, rule.key


def test_files_of_evaluate_and_reconstruct_are_read_and_kept_apart(tmp_path):
    write_json(FULL, tmp_path / "a.json")
    write_json(reconstruction(rfid=1.2), tmp_path / "b.json")
    write_json(reconstruction(rfid=1.5, psnr=float("inf"), num_images=100), tmp_path / "c.json")
    text = format_comparison(compare([tmp_path / "b.json", tmp_path / "c.json"]))
    assert "rFID" in text and "+0.3000" not in text and "num images is 256 / 100" in text
    mixed = compare([tmp_path / "a.json", tmp_path / "b.json"])
    assert mixed.obstacles[0].rule.key == "schema"
    assert mixed.scores["fid"][1].value is None and mixed.scores["rfid"][0].value is None
    write_comparison_page(tmp_path / "mixed.html", mixed)


def test_what_is_no_result_is_refused_with_its_name(tmp_path):
    write_json(FULL, tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"schema": "genvision.sweep/1"}')
    with pytest.raises(UserError, match=r"b\.json: key 'schema'"):
        compare([tmp_path / "a.json", tmp_path / "b.json"])
    (tmp_path / "c.json").write_text('{"schema": "genvision.reconstruction/1", "psnr": "high"}')
    with pytest.raises(UserError, match=r"c\.json: key"):
        compare([tmp_path / "a.json", tmp_path / "c.json"])
    with pytest.raises(UserError, match="at least 2"):
        compare([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.json", "b.json"], ["a", "b"]),
        (["x/results.json", "y/results.json"], ["x", "y"]),
        (["m/x/results.json", "n/x/results.json"], ["m/x", "n/x"]),
        (["x/a.json", "y/a.json", "y/b.json"], ["x/a", "y/a", "y/b"]),
        (["a.json", "a.json"], ["a (1)", "a (2)"]),
    ],
)
def test_results_are_called_by_the_shortest_names_that_tell_them_apart(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_page_marks_what_differs_and_says_what_cannot_be_compared(tmp_path):
    write_comparison_page(tmp_path / "new" / "page.html", together(FULL, BETTER, changed(num_generated=10000, model="<b>")))
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.index("These scores cannot be compared") < page.index("3.94")
    assert '<td class="other">1.75</td>' in page and '<td class="other">10,000</td>' in page
    assert '<td class="other">2000</td>' not in page
    assert "not comparable: num generated" in page and "-0.38 better" in page
    assert "facts are the same in all" in page and "<b>" not in page.replace("&lt;b&gt;", "")
    assert "src=" not in page and "href=" not in page and "<script" not in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_warnings_and_notes_that_several_results_have_are_told_once():
    comparison = together(FULL, BETTER, changed(warnings=["few images"]))
    lines = format_comparison(comparison).splitlines()
    assert "warning: a, b: samples look sorted by class" in lines and "warning: c: few images" in lines
