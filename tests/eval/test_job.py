import numpy as np
import pytest
import torch

from genvision.errors import UserError
from genvision.eval.features import Extractor, load_extractor
from genvision.eval.job import digits_floor, evaluate, measure_reference, score_arrays
from genvision.images import save_npz, save_png


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("digits")


@pytest.fixture(scope="module")
def reference(digits_second, extractor):
    return measure_reference(digits_second[0], extractor)


def test_real_digits_against_the_other_half_set_the_floor(digits_first, reference, extractor):
    floor = digits_floor()
    assert 0 < floor.fid < 5
    assert floor.class_accuracy >= 0.95
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    bad = score_arrays(noise, np.arange(200) % 10, reference, extractor=extractor)
    assert bad.fid > 20 * floor.fid
    assert bad.class_accuracy < 0.3


def test_arrays_files_and_specs_agree(tmp_path, digits_first, reference, extractor):
    images, labels = digits_first
    save_npz(tmp_path / "samples.npz", images, labels)
    for i in range(len(images)):
        save_png(images[i], tmp_path / "folder" / str(labels[i]) / f"{i:06d}.png")
    results = [
        score_arrays(images, labels, reference, extractor=extractor),
        evaluate(str(tmp_path / "samples.npz"), "digits:second", extractor="digits", show_progress=False),
        evaluate(f"folder:{tmp_path / 'folder'}", "digits:second", extractor="digits", show_progress=False, num_workers=1),
        evaluate("digits:first", "digits:second", extractor="digits", show_progress=False),
    ]
    for result in results:
        assert result.fid == pytest.approx(results[0].fid, rel=1e-4)
        assert result.class_accuracy == results[0].class_accuracy
        assert (result.num_generated, result.num_reference, result.image_size) == (898, 899, 8)
        assert result.extractor_hash == extractor.weights_hash
    assert results[1].inception_score == pytest.approx(results[0].inception_score, rel=1e-5)
    assert len({result.generated_fingerprint for result in results}) == 4
    assert len({result.reference_fingerprint for result in results[1:]}) == 1
    assert [result.labels for result in results[::2]] == ["unbalanced", "unbalanced, sorted by class"]


def test_batch_size_and_order_do_not_move_the_scores(digits_first, reference, extractor):
    images, labels = digits_first[0][:130], digits_first[1][:130]
    whole = score_arrays(images, labels, reference, extractor=extractor, batch_size=64)
    for size in (1, 7):
        other = score_arrays(images, labels, reference, extractor=extractor, batch_size=size)
        assert other.fid == pytest.approx(whole.fid, rel=1e-4)
        assert other.inception_score == pytest.approx(whole.inception_score, rel=1e-4)
        assert other.class_accuracy == whole.class_accuracy
    order = torch.randperm(130).numpy()
    shuffled = score_arrays(images[order], labels[order], reference, extractor=extractor)
    assert shuffled.fid == pytest.approx(whole.fid, rel=1e-4)
    assert shuffled.class_accuracy == whole.class_accuracy


def test_a_set_against_itself_and_a_collapsed_set(digits_first, extractor):
    images, labels = digits_first
    itself = score_arrays(images, labels, images, extractor=extractor)
    assert abs(itself.fid) < 1e-4
    collapsed = score_arrays(images[:1].repeat(100, axis=0), labels[:1].repeat(100), images, extractor=extractor)
    assert collapsed.inception_score == pytest.approx(1.0)
    assert collapsed.fid > 10 * abs(itself.fid) + 10


def test_the_judge_holds_images_against_the_labels_asked_for(digits_first, extractor):
    images, labels = digits_first
    wrong = score_arrays(images, (labels + 1) % 10, None, extractor=extractor, metrics=["class_accuracy"])
    assert wrong.class_accuracy < 0.03
    assert wrong.judge_hash not in (None, wrong.extractor_hash)


def test_class_names_decide_which_digit_is_wanted(tmp_path, digits_first):
    images, labels = digits_first
    for i in np.flatnonzero(labels >= 7)[:60]:
        save_png(images[i], tmp_path / str(labels[i]) / f"{i}.png")
    result = evaluate(str(tmp_path), None, extractor="digits", show_progress=False)
    assert result.class_accuracy > 0.9
    assert result.fid is None


def test_only_what_was_asked_for_is_measured(digits_first, reference, extractor):
    images, labels = digits_first
    result = score_arrays(images[:20], labels[:20], reference, extractor=extractor, metrics=["is"])
    assert result.inception_score is not None
    assert result.fid is result.reference is result.num_reference is result.class_accuracy is None
    assert score_arrays(images[:20], None, reference, extractor=extractor).class_accuracy is None


def test_small_sets_are_scored_with_a_warning(digits_first, reference, extractor, capsys):
    result = score_arrays(digits_first[0][:40], None, reference, extractor=extractor)
    assert len(result.warnings) == 1
    assert "40 images, fewer than the 64 features" in result.warnings[0]
    assert capsys.readouterr().err.splitlines() == [f"warning: {result.warnings[0]}"]
    assert not score_arrays(digits_first[0], None, reference, extractor=extractor).warnings


def test_crop_brings_both_sets_to_one_size(tmp_path, digits_first):
    images, labels = digits_first
    save_npz(tmp_path / "large.npz", images[:80].repeat(2, axis=1).repeat(2, axis=2), labels[:80])
    with pytest.raises(UserError, match=r"16x16 pixels, the reference digits:second of 8x8; give --image-size"):
        evaluate(str(tmp_path / "large.npz"), "digits:second", extractor="digits")
    result = evaluate(str(tmp_path / "large.npz"), "digits:second", extractor="digits", image_size=8, show_progress=False)
    same = evaluate("digits:first", "digits:second", extractor="digits", metrics=["class_accuracy"], show_progress=False)
    assert result.crop == "ADM centre crop to 8"
    assert result.class_accuracy == pytest.approx(same.class_accuracy, abs=0.05)


def test_an_image_of_another_size_is_named(tmp_path):
    for name, side in (("a", 8), ("b", 8), ("c", 9)):
        save_png(np.zeros((side, side, 3), dtype=np.uint8), tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"c\.png: 9x9 pixels, but the first image of its set has 8x8"):
        evaluate(str(tmp_path), "digits:second", extractor="digits", metrics=["fid"], show_progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid", "kidd"]}, "'kidd' is unknown; choose from fid, is, class_accuracy"),
        ({"metrics": []}, "choose from"),
        ({"metrics": ["fid"], "reference": None}, "fid compares with a reference"),
        ({"metrics": ["class_accuracy"], "labels": None}, "called 0 to 9"),
        ({"images": np.zeros((1, 8, 8, 3), dtype=np.uint8), "labels": None, "metrics": ["fid"]}, "at least 2 images, got 1"),
        ({"images": np.zeros((9, 8, 8, 3), dtype=np.uint8), "labels": None}, "at least 10 images, got 9"),
        ({"images": np.zeros((20, 8, 8, 3)), "labels": None}, "uint8"),
        ({"labels": np.zeros(3, dtype=np.int64)}, "need as many labels"),
        ({"images": np.zeros((20, 8, 9, 3), dtype=np.uint8), "labels": None}, "expected a square"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(arguments, message, reference, extractor, digits_first):
    given = {"images": digits_first[0][:20], "labels": digits_first[1][:20], "reference": reference, "extractor": extractor, **arguments}
    with pytest.raises(UserError, match=message) as caught:
        score_arrays(**given)
    assert "\n" not in str(caught.value)


def test_a_reference_of_another_extractor_is_refused(reference, extractor, digits_first):
    class Other(type(extractor)):
        pass

    other = Other()
    other.weights_hash = "0"
    with pytest.raises(UserError, match="measured with another extractor"):
        score_arrays(digits_first[0], None, reference, extractor=other)


def test_a_specs_extractor_and_reference_must_exist():
    with pytest.raises(UserError, match="extractor 'x' is unknown"):
        evaluate("digits", "digits", extractor="x")
    with pytest.raises(UserError):
        evaluate("digits", "folder:nowhere", extractor="digits")
