import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.errors import UserError
from genvision.eval.cache import StatisticsCache
from genvision.eval.features import ExtractorOptions, load_extractor
from genvision.eval.job import EvaluationOptions, digits_floor, evaluate, plan_evaluation, score_arrays
from genvision.eval.measurement import NUM_BLOCKS, block_of
from genvision.images import save_npz, save_png
from genvision.jobs.statistics import write_data_statistics

OPTIONS = EvaluationOptions(protocol="digits", show_progress=False)
NUMBERS = ("fid", "kid", "inception_score", "inception_score_std", "fid_infinity", "fid_bias")


def only(*metrics: str, **changes) -> EvaluationOptions:
    return replace(OPTIONS, metrics=metrics, **changes)


def test_real_digits_against_the_other_half_set_the_floor():
    floor = digits_floor()
    assert 0 < floor.fid < 5
    assert floor.class_accuracy >= 0.95
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    bad = score_arrays(noise, np.arange(200) % 10, "digits:second", options=OPTIONS)
    assert bad.fid > 20 * floor.fid
    assert bad.class_accuracy < 0.3
    good = evaluate("digits:first", "digits:second", options=only("pr"))
    assert bad.recall < 0.3 < 0.7 < good.recall and bad.precision < good.precision


def test_arrays_files_and_specs_agree(tmp_path, digits_first):
    images, labels = digits_first
    save_npz(tmp_path / "samples.npz", images, labels)
    for i in range(len(images)):
        save_png(images[i], tmp_path / "folder" / str(labels[i]) / f"{i:06d}.png")
    results = [
        score_arrays(images, labels, "digits:second", options=OPTIONS),
        evaluate(str(tmp_path / "samples.npz"), "digits:second", options=OPTIONS),
        evaluate(f"folder:{tmp_path / 'folder'}", "digits:second", options=replace(OPTIONS, num_workers=1)),
        evaluate("digits:first", "digits:second", options=OPTIONS),
    ]
    for result in results:
        assert result.fid == pytest.approx(results[0].fid, rel=1e-4)
        assert result.class_accuracy == results[0].class_accuracy
        assert result.precision == pytest.approx(results[0].precision, abs=2 / 898)
        assert (result.num_generated, result.num_reference, result.image_size) == (898, 899, 8)
    assert len({result.generated_hash for result in results}) == 1  # the same pixels, whatever their format and order
    assert len({result.reference_hash for result in results}) == 1
    assert [result.labels for result in results[::2]] == ["unbalanced", "unbalanced, sorted by class"]
    assert results[2].generated_formats == {"PNG": 898}


def test_a_permutation_moves_nothing_but_what_the_result_names(digits_first):
    images, labels = digits_first
    order = np.random.default_rng(0).permutation(len(images))
    everything = only("fid", "is", "pr", "kid", "class_accuracy")
    whole = score_arrays(images, labels, "digits:second", options=everything)
    other = score_arrays(images[order], labels[order], "digits:second", options=everything)
    assert whole.order_sensitive == ["inception_score", "kid"]
    for key in ("fid", "precision", "recall", "class_accuracy", "fid_infinity"):
        assert getattr(other, key) == pytest.approx(getattr(whole, key), rel=1e-6), key
    for key in ("fid_interval", "precision_interval", "kid_interval", "class_accuracy_interval"):
        assert getattr(other, key) == pytest.approx(getattr(whole, key), rel=1e-4, abs=1e-9), key
    assert other.generated_hash == whole.generated_hash
    assert other.inception_score != whole.inception_score


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_moves_nothing_beyond_rounding(digits_first, batch_size):
    images, labels = digits_first[0][:130], digits_first[1][:130]
    whole = score_arrays(images, labels, "digits:second", options=OPTIONS)
    other = score_arrays(images, labels, "digits:second", options=replace(OPTIONS, batch_size=batch_size))
    for key in NUMBERS:
        if getattr(whole, key) is not None:
            assert getattr(other, key) == pytest.approx(getattr(whole, key), rel=1e-4), key


def test_a_set_against_itself_and_a_collapsed_set(digits_first):
    images, labels = digits_first
    itself = score_arrays(images, labels, images, options=OPTIONS)
    assert abs(itself.fid) < 1e-6
    assert itself.precision == itself.recall == 1
    collapsed = score_arrays(images[:1].repeat(100, axis=0), labels[:1].repeat(100), images, options=OPTIONS)
    assert collapsed.inception_score == pytest.approx(1.0)
    assert collapsed.fid > 10
    assert collapsed.precision == 1 and collapsed.recall < 0.05
    assert collapsed.num_duplicates == 99
    assert any("identical" in line for line in collapsed.warnings)
    few = score_arrays(np.concatenate([images[:200], images[:3]]), None, None, options=only("is"))
    assert few.num_duplicates == 3 and not any("identical" in line for line in few.warnings)


def test_the_result_says_how_sure_it_is(digits_first):
    result = score_arrays(*digits_first, "digits:second", options=OPTIONS)
    for key in ("fid", "precision", "class_accuracy"):
        low, high = getattr(result, f"{key}_interval")
        assert low < high
    assert result.fid_interval[0] <= result.fid <= result.fid_interval[1]
    assert result.fid_debiased == pytest.approx(result.fid - result.fid_bias)
    assert result.fid_infinity < result.fid
    assert [num for num, _ in result.fid_curve] == [90, 180, 449, 898]
    assert "jackknife" in result.interval_method
    assert {row["name"] for row in result.per_class} == set("0123456789")
    assert sum(row["num"] for row in result.per_class) == 898
    total = sum(row["num"] * row["class_accuracy"] for row in result.per_class) / 898
    assert total == pytest.approx(result.class_accuracy)


def test_blocks_are_about_equal_and_belong_to_the_images(digits_first):
    from genvision.eval.hygiene import hash_images

    hashes = hash_images(digits_first[0])
    blocks = block_of(hashes)
    assert np.bincount(blocks, minlength=NUM_BLOCKS).min() > 50
    np.testing.assert_array_equal(block_of(hashes[::-1].copy()), blocks[::-1])


def test_the_judge_holds_images_against_the_labels_asked_for(digits_first):
    images, labels = digits_first
    wrong = score_arrays(images, (labels + 1) % 10, None, options=only("class_accuracy"))
    assert wrong.class_accuracy < 0.03
    assert wrong.judge_hash not in (None, wrong.extractor_hash)


def test_class_names_decide_which_digit_is_wanted(tmp_path, digits_first):
    images, labels = digits_first
    for i in np.flatnonzero(labels >= 7)[:60]:
        save_png(images[i], tmp_path / str(labels[i]) / f"{i}.png")
    result = evaluate(str(tmp_path), None, options=OPTIONS)
    assert result.class_accuracy > 0.9
    assert result.fid is None


def test_only_what_was_asked_for_is_measured(digits_first):
    images, labels = digits_first
    result = score_arrays(images[:20], labels[:20], "digits:second", options=only("is"))
    assert result.inception_score is not None
    assert result.fid is result.reference is result.num_reference is result.class_accuracy is result.precision is None
    assert score_arrays(images[:20], None, "digits:second", options=OPTIONS).class_accuracy is None


def test_small_sets_are_scored_with_a_warning(digits_first, capsys):
    result = score_arrays(digits_first[0][:40], None, "digits:second", options=only("fid"))
    assert any("40 images" in line for line in result.warnings)
    assert f"warning: {result.warnings[0]}" in capsys.readouterr().err.splitlines()


def test_crop_brings_both_sets_to_one_size(tmp_path, digits_first):
    images, labels = digits_first
    save_npz(tmp_path / "large.npz", images[:80].repeat(2, axis=1).repeat(2, axis=2), labels[:80])
    with pytest.raises(UserError, match=r"16x16 pixels, the reference digits:second of 8x8; crop both"):
        evaluate(str(tmp_path / "large.npz"), "digits:second", options=OPTIONS)
    result = evaluate(str(tmp_path / "large.npz"), "digits:second", options=replace(OPTIONS, image_size=8))
    same = evaluate("digits:first", "digits:second", options=only("class_accuracy"))
    assert result.crop == "ADM centre crop to 8"
    assert result.class_accuracy == pytest.approx(same.class_accuracy, abs=0.05)


def test_an_image_of_another_size_is_named(tmp_path):
    for name, side in (("a", 8), ("b", 8), ("c", 9)):
        save_png(np.zeros((side, side, 3), dtype=np.uint8), tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"c\.png: 9x9 pixels, but the first image of its set has 8x8"):
        evaluate(str(tmp_path), "digits:second", options=only("fid"))


@pytest.mark.parametrize(
    ("arguments", "metrics", "message"),
    [
        ({}, ("fid", "kidd"), "'kidd' is unknown; choose from fid, is, pr, kid, class_accuracy"),
        ({}, ("sfid",), "'sfid' is no part of protocol digits; use --protocol adm"),
        ({}, (), "choose from"),
        ({"reference": None}, ("fid",), "fid compares with a reference and none was given"),
        ({"labels": None}, ("class_accuracy",), "called 0 to 9"),
        ({"images": np.zeros((1, 8, 8, 3), dtype=np.uint8), "labels": None}, ("fid",), "at least 2 images, got 1"),
        ({"images": np.zeros((3, 8, 8, 3), dtype=np.uint8), "labels": None}, ("pr",), "at least 4 images, got 3"),
        ({"images": np.zeros((9, 8, 8, 3), dtype=np.uint8), "labels": None}, None, "at least 10 images, got 9"),
        ({"images": np.zeros((20, 8, 8, 3)), "labels": None}, None, "uint8"),
        ({"labels": np.zeros(3, dtype=np.int64)}, None, "need as many labels"),
        ({"images": np.zeros((20, 8, 9, 3), dtype=np.uint8), "labels": None}, None, "expected a square"),
        ({"reference": "folder:nowhere"}, None, "nowhere"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(arguments, metrics, message, digits_first):
    given = {"images": digits_first[0][:20], "labels": digits_first[1][:20], "reference": "digits:second", **arguments}
    with pytest.raises(UserError, match=message) as caught:
        score_arrays(**given, options=replace(OPTIONS, metrics=metrics))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "admm"}, "protocol 'admm' is unknown; choose one of adm, torch-fidelity"),
        ({"extractor": "x"}, "extractor 'x' is unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_options_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        evaluate("digits:first", "digits:second", options=replace(OPTIONS, **changes))


def test_an_extractor_without_what_a_metric_needs_is_refused():
    options = EvaluationOptions(protocol="adm", metrics=("sfid",), extractor="digits", show_progress=False)
    with pytest.raises(UserError, match="sfid needs the features of Inception, extractor 'digits' has none"):
        evaluate("digits:first", "digits:second", options=options)


class TestCachedReferences:
    def scores(self, reference, cache, **changes):
        return evaluate("digits:first", reference, options=replace(OPTIONS, cache=StatisticsCache(cache), **changes))

    def test_give_the_same_numbers(self, tmp_path):
        fresh, cached = (self.scores("digits:second", tmp_path) for _ in range(2))
        assert (fresh.reference_cached, cached.reference_cached) == (False, True)
        for key in NUMBERS:
            assert getattr(fresh, key) == getattr(cached, key), key

    def test_are_never_used_for_changed_data(self, tmp_path, digits_second):
        images, _ = digits_second
        for i in range(60):
            save_png(images[i], tmp_path / "data" / f"{i:03d}.png")
        before = self.scores(f"folder:{tmp_path / 'data'}", tmp_path / "cache")
        victim = tmp_path / "data" / "030.png"
        stamp = victim.stat()
        picture = np.asarray(Image.open(victim)).copy()
        picture[4, 4] ^= 128
        Image.fromarray(picture).save(victim)
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        after = self.scores(f"folder:{tmp_path / 'data'}", tmp_path / "cache")
        assert after.reference_cached is False
        assert after.fid != before.fid
        assert after.reference_hash != before.reference_hash

    def test_are_named_and_measured_again_when_damaged(self, tmp_path, capsys):
        before = self.scores("digits:second", tmp_path)
        for path in tmp_path.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-50])
        after = self.scores("digits:second", tmp_path)
        assert after.reference_cached is False
        assert any(".safetensors" in line for line in after.warnings)
        assert after.fid == before.fid
        assert self.scores("digits:second", tmp_path).reference_cached is True

    def test_of_another_crop_are_others(self, tmp_path):
        self.scores("digits:second", tmp_path)
        assert self.scores("digits:second", tmp_path, image_size=8).reference_cached is False


def test_statistics_written_to_a_file_serve_as_a_reference(tmp_path):
    out = tmp_path / "digits.safetensors"
    line = write_data_statistics("digits:second", out, options=OPTIONS)
    assert "899 images of 8x8" in line
    direct = evaluate("digits:first", "digits:second", options=only("fid"))
    stored = evaluate("digits:first", str(out), options=only("fid"))
    assert stored.fid == pytest.approx(direct.fid, rel=1e-9)
    assert stored.reference_origin == "stored statistics"
    assert stored.num_reference_statistics == 899
    everything = evaluate("digits:first", str(out), options=OPTIONS)
    assert everything.precision is None and everything.fid is not None
    assert any(note.startswith("not measured: ") and "pr compares with images" in note for note in everything.notes)
    with pytest.raises(UserError, match="pr compares with images"):
        evaluate("digits:first", str(out), options=only("pr"))
    with pytest.raises(UserError, match="is there already"):
        write_data_statistics("digits:second", out, options=OPTIONS)
    with pytest.raises(UserError, match=r"NAME\.safetensors"):
        write_data_statistics("digits:second", tmp_path / "digits.npz", options=OPTIONS)


def test_adms_file_uses_statistics_for_fid_and_images_for_precision(tmp_path, digits_first, digits_second):
    """Stored mu and sigma differ from those of the images beside them on purpose."""
    images = digits_second[0]
    extractor = load_extractor("digits")
    features = extractor(images[:400]).features.double().numpy()
    np.savez(
        tmp_path / "VIRTUAL.npz",
        arr_0=images[400:],
        mu=features.mean(0).astype(np.float32),
        sigma=np.cov(features, rowvar=False),
    )
    result = score_arrays(*digits_first, str(tmp_path / "VIRTUAL.npz"), options=only("fid", "pr", "kid"))
    by_statistics = score_arrays(*digits_first, images[:400], options=only("fid"))
    by_images = score_arrays(*digits_first, images[400:], options=only("pr", "kid"))
    assert result.fid == pytest.approx(by_statistics.fid, rel=1e-4)
    assert (result.precision, result.recall) == (by_images.precision, by_images.recall)
    assert result.kid == pytest.approx(by_images.kid, rel=1e-6)
    assert result.reference_origin == "stored statistics for Frechet distances, its 499 images for the rest"
    assert result.num_reference == 499


def test_everything_is_refused_before_the_reference_is_measured(tmp_path):
    class Unreadable(type(load_extractor("digits"))):
        def forward(self, pixels: torch.Tensor):
            raise AssertionError("nothing may be looked at")

    options = replace(OPTIONS, extractor=Unreadable(ExtractorOptions()))
    with pytest.raises(UserError, match="16x16 pixels, the reference digits of 8x8"):
        plan_evaluation("digits", num=100, image_size=16, label_names=["a"], options=options)


def test_huge_references_are_compared_image_by_image_only_when_asked(monkeypatch):
    monkeypatch.setattr("genvision.eval.job.MAX_COMPARED_IMAGES", 800)
    result = evaluate("digits:first", "digits:second", options=OPTIONS)
    assert result.precision is None and result.fid is not None
    assert any("pr compares image by image" in note for note in result.notes)
    assert evaluate("digits:first", "digits:second", options=only("pr")).precision is not None


def test_the_result_is_plain_json(digits_first):
    from genvision.eval.report import to_json

    result = score_arrays(*digits_first, "digits:second", options=OPTIONS)
    content = json.loads(to_json(result))
    assert content["schema"] == "genvision.evaluation/1"
    assert content["fid"] == result.fid
    assert content["notes"] and "ADM's blocks of 5,000" in content["notes"][0]
