import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from result_examples import FULL, changed

from genvision.eval.gallery import choose_classes
from genvision.eval.page import FACTS, page_indices, write_page, write_sweep_page
from genvision.eval.report import NOT_FIELDS, is_score_key, value_text
from genvision.eval.result import EvaluationResult

VOID = {"meta", "img", "br", "wbr"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[np.ndarray]:
        sources = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]


@pytest.fixture
def page_of(tmp_path):
    def make(*args, **kwargs) -> Page:
        write_page(tmp_path / "page.html", *args, **kwargs)
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return make


def noise(num: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def test_page_loads_and_runs_nothing(page_of):
    page = page_of(FULL, noise(4), np.array([0, 0, 1, 1]), ["tench", "goldfish"])
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "form", "base"})
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("src", "data:").startswith("data:") and "href" not in attrs, tag
    assert "url(" not in page.source and "@import" not in page.source
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def spoken_by(word: str) -> EvaluationResult:
    """A result in which every text is this word: names of files and classes, or a file that somebody sent."""
    texts = {
        field.name: word
        for field in dataclasses.fields(FULL)
        if field.name not in ("schema", "kind") and isinstance(getattr(FULL, field.name), str)
    }
    return changed(
        **texts,
        warnings=[word],
        notes=[word],
        sampling={word: word, "sampler": {"name": word, word: word}},
        versions={word: word},
        generated_formats={word: 3},
        per_class=[{"label": i, "name": word, "num": 2, "precision": 0.5} for i in range(2)],
        order_sensitive=[word],
    )


def test_text_from_users_stays_text(page_of):
    def structure(word: str) -> list[tuple[str, list[str]]]:
        page = page_of(spoken_by(word), noise(2), np.array([0, 1]), [word, word], compare=[FULL])
        return [(tag, sorted(attrs)) for tag, attrs in page.tags if tag != "wbr"]

    assert structure(HOSTILE) == structure("harmless")
    text = page_of(spoken_by(HOSTILE), noise(2), np.array([0, 1]), [HOSTILE, HOSTILE]).text
    assert text.count(HOSTILE) > 15


def test_a_name_that_no_utf8_can_hold_does_not_stop_the_page(page_of):
    assert "samples?" in page_of(changed(model=None, generated="samples\udcff")).text


def test_scores_stand_with_their_intervals_and_warnings_come_before_them(page_of):
    text = page_of(FULL).text
    assert "FID ↓ 3.94 95 % [3.90, 3.98]" in text
    assert "Inception Score ↑ 215.8" in text
    assert text.index("samples look sorted by class") < text.index("3.94")
    assert "Depends on the order of the images: Inception Score" in text
    assert "Read this first" not in page_of(changed(warnings=[])).text


def test_bars_share_one_scale_and_an_interval_too_wide_for_it_has_none(page_of):
    assert page_of(FULL).source.count('class="bar"') == 3
    text = page_of(changed(kid_interval=None)).text
    assert "from 2 % below to 2 % above" in text
    wide = page_of(changed(kid_interval=(-0.02, 0.08)))
    assert wide.source.count('class="bar"') == 2 and "[-0.02000, 0.08000]" in wide.text and "from 2 % below" in wide.text


def test_everything_that_the_scores_depend_on_is_on_the_page(page_of):
    text = page_of(changed(sampling=None)).text.split("The result file (JSON)")[0]
    skipped = {"sampling", "per_class", "fid_curve", "versions", "kid_std"}
    for field in dataclasses.fields(FULL):
        value = getattr(FULL, field.name)
        if value is None or field.name in skipped or isinstance(value, dict | list | tuple | float):
            continue
        assert value_text(field.name, value) in text, field.name
    assert "2.14.1" in text
    assert "sampler guidance scale 1.5" in page_of(FULL).text


def test_no_field_is_forgotten_by_the_tables(page_of):
    listed = {key for keys in FACTS.values() for key in keys}
    for field in dataclasses.fields(FULL):
        assert field.name in listed or is_score_key(field.name) or field.name in NOT_FIELDS, field.name


def test_samples_keep_their_pixels(page_of):
    images = noise(5)
    page = page_of(FULL, images)
    for found, image in zip(page.images(), images, strict=True):
        np.testing.assert_array_equal(found, image)
    assert "5 of 50,000 images" in page.text


def test_many_samples_are_spread_over_the_array_and_large_ones_made_smaller(page_of):
    images = np.zeros((640, 4, 4, 3), dtype=np.uint8) + np.repeat(np.arange(64), 10).astype(np.uint8)[:, None, None, None]
    shown = [int(image[0, 0, 0]) for image in page_of(FULL, images).images()]
    assert len(shown) == 64 and shown[0] == 0 and shown[-1] == 63 and shown == sorted(shown) and len(set(shown)) > 60
    few = np.zeros((49, 256, 256, 3), dtype=np.uint8)
    assert {image.shape for image in page_of(FULL, few[:48]).images()} == {(256, 256, 3)}
    page = page_of(FULL, few)
    assert {image.shape for image in page.images()} == {(224, 224, 3)} and "made smaller" in page.text


def test_each_class_has_a_row_with_its_scores(page_of):
    page = page_of(FULL, noise(20), np.arange(20) % 2, ["tench", "goldfish"])
    text = page.text
    assert "tench precision 0.810, FID 9.12, 25,000 images" in text
    assert "goldfish precision 0.840, 25,000 images" in text
    assert len(page.images()) == 20 + 2 * 8


def test_without_labels_or_with_one_class_there_are_no_rows(page_of):
    assert "Class by class" not in page_of(changed(per_class=None), noise(3), np.zeros(3, dtype=int), ["tench"]).text
    assert "Class by class" not in page_of(changed(per_class=None), noise(3)).text


def test_of_many_classes_the_worst_and_the_best_are_shown_worst_first():
    per_class = [{"label": i, "name": str(i), "num": 5, "precision": (i * 7 % 100) / 100} for i in range(100)]
    labels = np.repeat(np.arange(100), 3)
    chosen = choose_classes(per_class, labels)
    precisions = [per_class[label]["precision"] for label in chosen]
    assert precisions == [i / 100 for i in (*range(10), *range(90, 100))]
    by_fid = [{"label": i, "fid": float(i)} for i in range(100)]
    assert choose_classes(by_fid, labels) == [*range(99, 89, -1), *range(9, -1, -1)]
    assert choose_classes(None, labels) == list(range(20))
    assert choose_classes(per_class[:5], np.array([4, 2, 2, 0])) == [0, 2, 4]


def test_images_for_the_page_are_those_of_the_classes_shown():
    per_class = [{"label": i, "name": str(i), "num": 30, "precision": i / 100} for i in range(100)]
    labels = np.tile(np.arange(100), 30)
    indices = page_indices(labels, per_class)
    assert len(indices) == len(set(indices)) == 20 * 8
    assert labels[indices].tolist() == np.repeat(choose_classes(per_class, labels), 8).tolist()
    assert page_indices(np.zeros(1000, dtype=int)) == sorted(set(page_indices(np.zeros(1000, dtype=int))))
    assert len(page_indices(np.zeros(1000, dtype=int))) == 64
    assert page_indices(np.zeros(3, dtype=int)) == [0, 1, 2]


def test_curve_shows_every_point_and_the_extrapolation_only_if_there_is_one(page_of):
    source = page_of(FULL).source
    assert "FID 4.6911 with 5,000 images" in source and "FID 3.8621, extrapolated" in source
    text = page_of(changed(fid_infinity=None, fid_infinity_interval=None)).text
    assert "too few images to extrapolate" in text and "diamond" not in text
    assert "FID and the number of images" not in page_of(changed(fid_curve=None, fid_bias=None)).text


def test_a_result_without_scores_or_with_scores_of_zero_makes_a_page(page_of):
    nothing = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall", "kid", "per_class", "fid_curve", "fid_bias"))
    assert "No score was measured" in page_of(changed(**nothing)).text
    page_of(
        changed(fid=0.0, fid_interval=(0.0, 0.0), recall=0.0, fid_infinity=0.0, fid_infinity_interval=None, fid_curve=[(2, 0.0), (4, 0.0)])
    )
    page_of(changed(fid=-4e-13, fid_curve=[(7, 1.0)], kid=-1e-6, kid_interval=(-2e-6, 1e-6), fid_infinity=2.0))


def test_other_results_stand_beside_this_one(page_of):
    text = page_of(FULL, compare=[changed(fid=4.5, fid_interval=(4.4, 4.6))]).text
    assert "Beside other results" in text and "+0.56 worse intervals apart" in text


def test_page_adapts_to_dark_screens_phones_and_paper(page_of):
    source = page_of(FULL).source
    for rule in ("prefers-color-scheme:dark", "@media print", "max-width:40rem", 'name="viewport"'):
        assert rule in source


def test_no_colour_is_used_without_being_defined(page_of):
    source = page_of(FULL).source
    for palette in re.findall(r":root\{(.*?)\}", source, re.DOTALL):
        assert set(re.findall(r"var\((--[\w-]+)\)", source)) <= set(re.findall(r"(--[\w-]+):", palette))
    assert len(re.findall(r":root\{", source)) == 3


@pytest.fixture
def sweep(tmp_path):
    def make(settings, results, best) -> Page:
        write_sweep_page(tmp_path / "sweep.html", settings, results, best)
        return Page((tmp_path / "sweep.html").read_text(encoding="utf-8"))

    return make


def test_sweep_draws_one_curve_for_each_combination_of_the_other_options(sweep):
    settings = [{"guidance": float(g), "steps": s} for s in (8, 12) for g in (1, 2, 3)]
    fids = [4.0, 3.0, 5.0, 3.5, 2.5, 4.5]
    results = [changed(fid=fid, fid_interval=(fid - 0.1, fid + 0.1), inception_score=100 + i) for i, fid in enumerate(fids)]
    page = sweep(settings, results, 4)
    curves = [attrs["class"] for tag, attrs in page.tags if tag == "polyline"]
    assert curves == ["line c0", "line c1"] * 3, "FID, Inception Score and one against the other, two curves in each"
    assert sum(attrs.get("class") == "ring" for _, attrs in page.tags) == 3
    text = page.text
    assert "guidance 2, steps 12" in text and "no other interval reaches into its own" in text
    assert "steps 8 steps 12" in text
    rows = re.findall(r'<tr class="best">', page.source)
    assert len(rows) == 1 and "2 12 2.50 [2.40, 2.60]" in text


def test_sweep_says_which_settings_cannot_be_told_from_the_best(sweep):
    settings = [{"guidance": g} for g in (1.0, 1.5, 2.0)]
    results = [changed(fid=fid, fid_interval=(fid - 0.2, fid + 0.2), inception_score=None) for fid in (3.0, 3.3, 5.0)]
    page = sweep(settings, results, 0)
    assert "the interval of 1 other reaches into its own" in page.text
    assert [attrs["class"] for tag, attrs in page.tags if tag == "polyline"] == ["line c0"]
    text = sweep(settings, [changed(fid=fid, fid_interval=None) for fid in (3.0, 3.3, 5.0)], 0).text
    assert "without intervals" in text


def test_sweep_of_one_setting_and_of_twelve_curves_makes_a_page(sweep):
    assert "1 setting of guidance" in sweep([{"guidance": 1.5}], [FULL], 0).text
    settings = [{"guidance": float(g), "steps": s} for s in range(12) for g in range(13)]
    page = sweep(settings, [FULL] * len(settings), 0)
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 36


def test_a_sweep_tells_a_warning_of_every_setting_once(tmp_path):
    results = [changed(warnings=[f"{i} of 100 images are identical", "too few images"], fid=float(i + 1)) for i in range(3)]
    write_sweep_page(tmp_path / "sweep.html", [{"guidance_scale": float(i)} for i in range(3)], results, best=0)
    page = (tmp_path / "sweep.html").read_text()
    assert "0 of 100 images are identical (so or alike in 3 settings)" in page and "1 of 100" not in page
    assert page.count("too few images") == 1
