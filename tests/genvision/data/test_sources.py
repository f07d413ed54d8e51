"""Sources: what they hold, and what they say when something is wrong."""

import io
import json
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from genvision.data.sources import BadImageError, open_image, open_source
from genvision.errors import UserError


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int = 0, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["bee/b.png", "bee/a.PNG", "ant/x.jpeg", "ant/deep/y.webp", "cat/z.bmp"]):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    (tmp_path / "set" / "bee" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "bee" / "._a.png").write_text("left by another system")
    return tmp_path / "set"


def refused(spec, *words):
    with pytest.raises(UserError) as caught:
        open_source(str(spec))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


class TestDigits:
    def test_are_the_real_digits(self):
        source = open_source("digits")
        assert len(source) == 1797
        assert source.label_names == [str(i) for i in range(10)]
        assert source.labels.dtype == np.int64
        assert source.labels[:10].tolist() == list(range(10))
        image = source.load(0)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        assert np.asarray(image)[0, 2].tolist() == [80, 80, 80]  # grey 5 of 16

    def test_halves_are_contiguous_and_share_nothing(self):
        whole, first, second = (open_source(spec) for spec in ("digits", "digits:first", "digits:second"))
        assert (len(first), len(second)) == (898, 899)
        np.testing.assert_array_equal(np.concatenate([first.labels, second.labels]), whole.labels)
        np.testing.assert_array_equal(np.concatenate([first.images, second.images]), whole.images)
        assert len({source.fingerprint() for source in (whole, first, second)}) == 3

    def test_unknown_part_and_missing_library_say_the_mend(self, monkeypatch):
        refused("digits:third", "third", "digits:first")
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        refused("digits", "pip install genvision[digits]")


class TestFolder:
    def test_sorted_sub_folders_are_the_classes(self, folder):
        source = open_source(f"folder:{folder}")
        assert source.label_names == ["ant", "bee", "cat"]
        assert source.labels.tolist() == [0, 0, 1, 1, 2]
        assert [source.name(i).removeprefix(f"{folder}/") for i in range(5)] == [
            "ant/deep/y.webp",
            "ant/x.jpeg",
            "bee/a.PNG",
            "bee/b.png",
            "cat/z.bmp",
        ]
        np.testing.assert_array_equal(np.asarray(source.load(3)), np.asarray(picture(0)))
        assert open_source(str(folder)).labels.tolist() == source.labels.tolist()

    def test_fingerprint_is_stable_and_sees_changes(self, folder):
        first = open_source(f"folder:{folder}").fingerprint()
        moved = folder.rename(folder.with_name("elsewhere"))
        assert open_source(f"folder:{moved}").fingerprint() == first
        picture(9, size=(20, 20)).save(moved / "cat" / "z.bmp")
        resized = open_source(f"folder:{moved}").fingerprint()
        (moved / "cat" / "z.bmp").rename(moved / "bee" / "z.bmp")
        picture(9, size=(20, 20)).save(moved / "cat" / "other.bmp")
        relabelled = open_source(f"folder:{moved}").fingerprint()
        assert len({first, resized, relabelled}) == 3

    def test_flat_folder_is_one_class(self, tmp_path):
        (tmp_path / "flowers").mkdir()
        picture().save(tmp_path / "flowers" / "1.png")
        source = open_source(f"folder:{tmp_path / 'flowers'}")
        assert (source.label_names, source.labels.tolist()) == (["flowers"], [0])

    def test_labels_file_names_images_and_labels(self, tmp_path):
        for i in range(3):
            picture(i).save(tmp_path / f"{i:06d}.png")
        picture().save(tmp_path / "grid.png")
        file = tmp_path / "labels.json"
        file.write_text(json.dumps({"labels": {"000000.png": 1, "000001.png": 0, "000002.png": 1}, "label_names": ["a", "b"]}))
        source = open_source(str(tmp_path))
        assert (source.labels.tolist(), source.label_names, len(source)) == ([1, 0, 1], ["a", "b"], 3)
        file.write_text(json.dumps({"labels": {"000000.png": 2}}))
        assert open_source(str(tmp_path)).label_names == ["0", "1", "2"]
        for content, word in (
            ({"labels": {"gone.png": 0}}, "gone.png"),
            ({"labels": {"000000.png": 2}, "label_names": ["a", "b"]}, "label 2"),
            ({"labels": {"000000.png": 10**6}}, "label 1000000, which is no number of a class"),
            ({"labels": {"000000.png": 0}, "label_names": {"0": "a"}}, "no list of texts"),
            ({"labels": {"000000.png": 0}, "label_names": "ab"}, "no list of texts"),
            ({"labels": {"000000.png": 10**30}}, "cannot be read"),
            ({"labels": {"000000.png": "cat"}}, "cat"),
            ({"labels": {}}, "no images"),
            ({"000000.png": 1}, "labels.json"),
            ([1, 2], "labels.json"),
        ):
            file.write_text(json.dumps(content))
            refused(tmp_path, word)
        for text in ("{", "[" * 100_000):
            file.write_text(text)
            refused(tmp_path, "labels.json", "expected")

    def test_wrong_folders_are_refused_with_the_mend(self, tmp_path, folder):
        refused(f"folder:{tmp_path / 'nothing'}", "nothing", "no such folder")
        (tmp_path / "empty").mkdir()
        refused(f"folder:{tmp_path / 'empty'}", "no images")
        (folder / "dog").mkdir()
        refused(f"folder:{folder}", "dog", "no images")
        (folder / "dog").rmdir()
        picture().save(folder / "stray.png")
        refused(f"folder:{folder}", "stray.png", "sub-folders")
        (folder / "stray.png").unlink()
        (folder / "loop").symlink_to(".")
        refused(f"folder:{folder}", "symbolic links", "check the path")
        (folder / "loop").unlink()
        (tmp_path / "root").mkdir()
        folder.rename(tmp_path / "root" / "train")
        refused(f"folder:{tmp_path / 'root'}", "splits, not classes", "root/train")


class TestDecoding:
    @pytest.mark.parametrize("name", ["t.png", "t.jpg", "t.webp", "t.bmp"])
    @pytest.mark.parametrize("keep", [0, 8, 0.5, 0.9])
    def test_truncated_files_fail_by_name(self, tmp_path, name, keep):
        path = tmp_path / "class" / name
        path.parent.mkdir()
        picture(size=(64, 64)).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        source = open_source(f"folder:{tmp_path}")
        with pytest.raises(BadImageError) as caught:
            source.load(0)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again)) == (BadImageError, str(caught.value))

    def test_a_vanished_file_is_a_bad_image(self, tmp_path, folder):
        source = open_source(f"folder:{folder}")
        (folder / "cat" / "z.bmp").unlink()
        with pytest.raises(BadImageError, match=r"z\.bmp.*No such file"):
            source.load(4)
        with pytest.raises(UserError, match=r"z\.bmp"):
            source.fingerprint()

    def test_every_mode_becomes_correct_rgb(self, tmp_path):
        rgb = picture()
        grey = rgb.convert("L")
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7)
        alpha = rgb.copy()
        alpha.putalpha(0)
        palette = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(7, 9)).convert("P")
        palette.putpalette([level for i in range(256) for level in (i, 255 - i, 3)])
        index = np.arange(63).reshape(7, 9)
        coloured = np.stack([index, 255 - index, np.full_like(index, 3)], axis=2)
        cases = {
            "deep.png": (deep, {}, np.asarray(grey.convert("RGB"))),
            "grey.png": (grey, {}, np.asarray(grey.convert("RGB"))),
            "alpha.png": (alpha, {}, np.asarray(rgb)),
            "palette.png": (palette, {}, coloured),
            "transparent.png": (palette, {"transparency": bytes(range(200))}, coloured),
            "bit.png": (grey.convert("1"), {}, np.asarray(grey.convert("1").convert("RGB"))),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, (image, options, expected) in cases.items():
                image.save(tmp_path / name, **options)
                opened = open_image(tmp_path / name)
                assert opened.mode == "RGB", name
                np.testing.assert_array_equal(np.asarray(opened), expected, err_msg=name)
        picture(size=(64, 64)).convert("L").convert("CMYK").save(tmp_path / "print.jpg", quality=95)
        difference = np.asarray(open_image(tmp_path / "print.jpg")).astype(int) - np.asarray(
            picture(size=(64, 64)).convert("L").convert("RGB")
        )
        assert abs(difference).mean() < 16

    def test_pixels_of_no_stated_range_are_refused_by_name(self, tmp_path):
        floats = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(floats).save(tmp_path / "float.tif")
        Image.fromarray(floats * np.float32(np.nan)).save(tmp_path / "nan.tif")
        Image.fromarray(np.full((8, 8), 1 << 20, dtype=np.int32)).save(tmp_path / "wide.tif")
        for name in ("float.tif", "nan.tif", "wide.tif"):
            with pytest.raises(BadImageError, match=rf"{name}: cannot be read as an image \(its pixels are .* no stated range"):
                open_image(tmp_path / name)

    def test_the_content_hash_sees_bytes_order_and_labels(self, folder, tmp_path):
        import os

        source = open_source(f"folder:{folder}")
        before = source.content_hash()
        assert before == open_source(f"folder:{folder}").content_hash()
        victim = folder / "bee" / "b.png"
        stamp, content = victim.stat(), bytearray(victim.read_bytes())
        content[-20] ^= 1  # same size, same time
        victim.write_bytes(content)
        os.utime(victim, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert source.content_hash() != before
        assert source.fingerprint() == open_source(f"folder:{folder}").fingerprint()

    def test_formats_are_told_by_their_bytes_not_their_names(self, folder):
        picture(9).save(folder / "bee" / "b.png", format="JPEG")
        assert open_source(f"folder:{folder}").stored_formats() == {"PNG": 1, "JPEG": 2, "WebP": 1, "BMP": 1}

    def test_exif_rotation_is_not_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(size=(9, 7)).save(tmp_path / "turned.jpg", exif=exif)
        assert open_image(tmp_path / "turned.jpg").size == (9, 7)

    def test_missing_single_image_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"nothing\.png"):
            open_image(tmp_path / "nothing.png")


class TestParquet:
    @pytest.fixture
    def write(self, tmp_path):
        import datasets

        def write(name, columns, features=None):
            datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name)
            return tmp_path / name

        return write

    def rows(self, seeds):
        return [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]

    def features(self):
        import datasets

        return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})

    def test_files_are_read_in_sorted_order_with_class_names(self, tmp_path, write):
        write("part-1.parquet", {"image": self.rows([2]), "label": [0]}, self.features())
        write("part-0.parquet", {"image": self.rows([0, 1]), "label": [1, 0]}, self.features())
        source = open_source(f"parquet:{tmp_path}/part-*.parquet")
        assert source.labels.tolist() == [1, 0, 0]
        assert source.label_names == ["ant", "bee"]
        for index in (2, 0, 1):
            np.testing.assert_array_equal(np.asarray(source.load(index)), np.asarray(picture(index)))
        assert source.name(1) == f"{tmp_path}/part-0.parquet: row 1"
        assert source.name(2) == f"{tmp_path}/part-1.parquet: row 0"
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(np.asarray(copy.load(2)), np.asarray(picture(2)))
        assert copy.fingerprint() == source.fingerprint()
        assert len(open_source(f"parquet:{tmp_path}")) == 3
        one = open_source(str(tmp_path / "part-0.parquet"))
        assert len(one) == 2
        assert one.fingerprint() != source.fingerprint()

    def test_columns_are_found_by_name_and_kind(self, write):
        names = open_source(str(write("a.parquet", {"img": self.rows([0, 1]), "fine_label": [3, 1], "coarse_label": [0, 0]})))
        assert (names.labels.tolist(), names.label_names) == ([3, 1], ["0", "1", "2", "3"])
        single = open_source(str(write("b.parquet", {"image": self.rows([0]), "species": [2], "comment": ["x"]})))
        assert single.labels.tolist() == [2]
        raw = open_source(str(write("c.parquet", {"image": [png(5)], "comment": ["x"]})))
        assert (raw.labels.tolist(), raw.label_names) == ([0], ["all"])
        np.testing.assert_array_equal(np.asarray(raw.load(0)), np.asarray(picture(5)))

    def test_what_cannot_be_used_is_refused(self, tmp_path, write):
        refused(f"parquet:{tmp_path}/none-*.parquet", "no file matches")
        refused(write("a.parquet", {"text": ["x"], "label": [0]}), "image or img", "text")
        refused(write("b.parquet", {"image": self.rows([0]), "one": [0], "two": [0]}), "one, two", "rename it to label")
        refused(write("c.parquet", {"image": self.rows([0]), "label": [-1]}), "label -1", "unlabelled split")
        refused(write("d.parquet", {"image": self.rows([0, 1]), "label": [0, None]}), "1 rows without a label")
        for labels, kind in ((["ant"], "string"), ([[0]], "list"), ([0.5], "double"), ([True], "bool")):
            refused(write("f.parquet", {"image": self.rows([0]), "label": labels}), f"label is {kind}", "whole numbers")
        cut = write("e.parquet", {"image": self.rows([0]), "label": [0]})
        cut.write_bytes(cut.read_bytes()[:-9])
        refused(cut, "e.parquet", "damaged")

    def test_a_column_of_texts_holds_paths(self, tmp_path, write):
        picture(3).save(tmp_path / "3.png")
        source = open_source(str(write("a.parquet", {"image": [str(tmp_path / "3.png"), "gone.png"], "label": [0, 0]})))
        np.testing.assert_array_equal(np.asarray(source.load(0)), np.asarray(picture(3)))
        assert source.encoded_bytes() is None
        with pytest.raises(BadImageError, match=r"a\.parquet: row 1.*No such file"):
            source.load(1)

    def test_damaged_row_fails_by_file_and_row(self, tmp_path, write):
        rows = [{"bytes": png(0), "path": "0.png"}, {"bytes": png(1)[:60], "path": "1.png"}, {"bytes": None, "path": None}]
        source = open_source(str(write("a.parquet", {"image": rows, "label": [0, 0, 0]})))
        source.load(0)
        with pytest.raises(BadImageError, match=r"a\.parquet: row 1"):
            source.load(1)
        with pytest.raises(BadImageError, match=r"a\.parquet: row 2.*no image"):
            source.load(2)


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_images_and_labels(self, tmp_path, save):
        images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
        save(tmp_path / "a.npz", images, np.array([2, 0, 1, 1]))
        source = open_source(str(tmp_path / "a.npz"))
        assert isinstance(source.images, np.memmap) == (save is np.savez)
        assert (source.labels.tolist(), source.label_names) == ([2, 0, 1, 1], ["0", "1", "2"])
        for opened in (source, pickle.loads(pickle.dumps(source))):
            np.testing.assert_array_equal(np.asarray(opened.load(3)), images[3])
        assert source.name(3) == f"{tmp_path}/a.npz[3]"
        save(tmp_path / "a.npz", images[:3], np.array([2, 0, 1]))
        assert open_source(f"npz:{tmp_path / 'a.npz'}").fingerprint() != source.fingerprint()

    def test_without_labels_it_is_one_class(self, tmp_path):
        np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), dtype=np.uint8))
        assert open_source(str(tmp_path / "samples.npz")).label_names == ["samples"]

    def test_what_cannot_be_used_is_refused(self, tmp_path):
        path = tmp_path / "a.npz"
        refused(f"npz:{path}", "no such file")
        np.savez(path, mu=np.zeros(3))
        refused(path, "arr_0", "mu")
        np.savez(path, np.zeros((2, 4, 4, 3)))
        refused(path, "float64", "uint8")
        np.savez(path, np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros(3, dtype=int))
        refused(path, "arr_1", "2 whole numbers")
        np.savez(path, np.zeros((2, 4, 4, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:-10])
        refused(path, "a.npz", "damaged")
        path.write_bytes(b"text")
        refused(path, "a.npz", "damaged")
        header = b"\x93NUMPY\x01\x00"
        file = io.BytesIO()
        np.save(file, np.zeros((2, 4, 4, 3), dtype=np.uint8))
        for content in (header + b"\x20\x00" + b"(" * 32, header + b"\x10\x00" + b"{'descr':'|u1'" + b" " * 20, file.getvalue()[:-3]):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("arr_0.npy", content)
                archive.writestr("other.npy", bytes(99))
            refused(path, "a.npz", "damaged")


def test_unknown_forms_list_the_known_ones(tmp_path):
    refused("foldr:x", "did you mean folder", "parquet:GLOB")
    refused("cub", "digits", "npz:FILE", "wds:SHARDS")
    refused("imagenet", "imagenet:ROOT")
    refused(f"{tmp_path}/no/such", "no such file or folder")
    refused("folder:", "PATH")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "a.txt", ".parquet")


def test_a_folder_that_is_called_like_a_form_opens_by_its_name_alone(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("cifar")
    assert open_source("cifar").label_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize(("path", "reason"), [("~no_such_user/set", "home directory"), ("x" * 300, "name too long")])
def test_paths_that_the_system_refuses_cost_a_line(path, reason):
    for spec in (path, f"folder:{path}", f"idx:{path}", f"mix:1*digits;1*folder:{path}"):
        assert reason in refused(spec, "check the path").lower()


def test_an_encoded_folder_is_refused_as_images():
    refused("encoded:codes", "holds codes")
