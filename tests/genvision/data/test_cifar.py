"""CIFAR as its archives hold it, at two images a file: pickles as Python 2 wrote them, and binary records."""

import pickle

import numpy as np
import pytest
from python2_pickle import dump_python2
from refused_sources import refused

from genvision.data.sources import open_source

NAMES = ["airplane", "automobile", "bird"]
RED_TO_BLUE = np.repeat(np.array([250, 128, 5], dtype=np.uint8), 1024)  # planes: every pixel is (250, 128, 5)


def rows(seed, num=2):
    return np.random.default_rng(seed).integers(0, 256, (num, 3072), dtype=np.uint8)


@pytest.fixture
def ten(tmp_path):
    """CIFAR-10: batch k holds the labels [k % 3, 0]; the first image is one colour."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        data = rows(number)
        if number == 1:
            data[0] = RED_TO_BLUE
        batch = {"batch_label": "training batch", "labels": [number % 3, 0], "data": data, "filenames": ["a_s_1.png", "b_s_2.png"]}
        dump_python2(batch, folder / f"data_batch_{number}")
    dump_python2({"labels": [2, 1, 0], "data": rows(9, 3)}, folder / "test_batch")
    dump_python2({"num_cases_per_batch": 2, "label_names": NAMES, "num_vis": 3072}, folder / "batches.meta")
    return folder


def hundred(folder):
    folder.mkdir()
    for name, num in (("train", 3), ("test", 2)):
        dump_python2({"data": rows(num, num), "fine_labels": [1] * num, "coarse_labels": [0] * num}, folder / name)
    dump_python2({"fine_label_names": ["apple", "aquarium_fish"], "coarse_label_names": ["fruit"]}, folder / "meta")
    return folder


def test_batches_come_one_after_the_other_with_their_labels(ten):
    source = open_source(f"cifar:{ten}")
    assert source.labels.tolist() == [1, 0, 2, 0, 0, 0, 1, 0, 2, 0]
    assert (source.label_names, source.labels.dtype) == (NAMES, np.int64)
    assert np.asarray(source.load(0))[31, 0].tolist() == [250, 128, 5]
    expected = rows(3)[1].reshape(3, 32, 32).transpose(1, 2, 0)
    for opened in (source, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(np.asarray(opened.load(5)), expected)
    assert source.name(5) == f"{ten}/data_batch_3[1]"
    assert len(pickle.dumps(source)) < 4000  # no images in it


def test_the_test_set_is_a_part_and_the_folder_above_will_do(ten):
    source = open_source(f"cifar:{ten.parent}:test")
    assert source.labels.tolist() == [2, 1, 0]
    assert source.fingerprint() != open_source(f"cifar:{ten}:train").fingerprint()
    assert source.stored_formats() == {"array": 3}


def test_both_hashes_see_a_changed_image(ten):
    before = open_source(f"cifar:{ten}:test")
    hashes = before.fingerprint(), before.content_hash()
    assert hashes[1] == open_source(f"cifar:{ten}:test").content_hash()
    dump_python2({"labels": [2, 1, 0], "data": rows(10, 3)}, ten / "test_batch")
    after = open_source(f"cifar:{ten}:test")
    assert after.fingerprint() != hashes[0] and after.content_hash() != hashes[1]


def test_cifar_100_has_its_fine_labels(tmp_path):
    source = open_source(f"cifar:{hundred(tmp_path / 'cifar-100-python')}")
    assert (source.labels.tolist(), source.label_names) == ([1, 1, 1], ["apple", "aquarium_fish"])


def test_the_binary_version_holds_the_same_images(tmp_path):
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    ten.mkdir()
    hundred.mkdir()
    for number in range(1, 6):
        (ten / f"data_batch_{number}.bin").write_bytes(b"".join(bytes([number % 3]) + row.tobytes() for row in rows(number)))
    (ten / "batches.meta.txt").write_text("\n".join([*NAMES, "", ""]))
    (hundred / "train.bin").write_bytes(b"\x13\x01" + RED_TO_BLUE.tobytes())
    (hundred / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    source = open_source(f"cifar:{ten}")
    assert source.labels.tolist() == [1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(np.asarray(source.load(5)), rows(3)[1].reshape(3, 32, 32).transpose(1, 2, 0))
    source = open_source(f"cifar:{hundred}")
    assert source.labels.tolist() == [1]
    assert np.asarray(pickle.loads(pickle.dumps(source)).load(0))[0, 31].tolist() == [250, 128, 5]
    (hundred / "train.bin").write_bytes(bytes(3075))
    refused(f"cifar:{hundred}", "train.bin", "3075 bytes", "multiple of 3074")


def test_what_is_missing_or_elsewhere_is_named(tmp_path, ten):
    refused(f"cifar:{tmp_path}/none", "no such file or folder")
    refused(f"cifar:{ten}:val", "no part 'val'", "train or test")
    (ten / "data_batch_4").rename(tmp_path / "away")
    refused(f"cifar:{ten}", "data_batch_4: is missing")
    (ten / "batches.meta").unlink()
    refused(f"cifar:{ten}:test", "batches.meta: is missing")
    hundred(tmp_path / "cifar-100-python")
    refused(f"cifar:{tmp_path}", "several forms", "cifar-100-python/meta")
    (tmp_path / "empty").mkdir()
    refused(f"cifar:{tmp_path}/empty", "holds no CIFAR")
    archive = tmp_path / "empty" / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    for spec in (archive.parent, archive):
        refused(f"cifar:{spec}", "extract it first")


class Foreign:
    pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [3, 0, 0]}, ["label 3", "expected 0 to 2"]),
        ({"labels": [0, -1, 0]}, ["label -1"]),
        ({"labels": [0, 0]}, ["labels is int64 [2]", "expected 3 whole numbers"]),
        ({"labels": [0, [1], 2]}, ["expected 3 whole numbers"]),
        ({"labels": ["a", "b", "c"]}, ["expected 3 whole numbers"]),
        ({"data": np.zeros((3, 3071), np.uint8)}, ["data is uint8 [3, 3071]", "uint8 [N, 3072]"]),
        ({"data": np.zeros((3, 3072))}, ["data is float64"]),
        ({"data": [1, 2, 3]}, ["data is list"]),
        ({"more": Foreign()}, ["wants to run", "Foreign"]),
    ],
)
def test_wrong_content_is_named_with_its_file(ten, change, words):
    (ten / "test_batch").write_bytes(pickle.dumps({"labels": [2, 1, 0], "data": rows(9, 3)} | change))
    refused(f"cifar:{ten}:test", "test_batch", *words)


def test_damaged_and_foreign_pickles_are_named_with_their_file(ten):
    whole = (ten / "test_batch").read_bytes()
    for content, words in (
        (whole[:-100], ["cut off"]),
        (b"", ["cannot be read"]),
        (pickle.dumps([1]), ["holds list"]),
        (pickle.dumps({"data": rows(1)}), ["has no labels but data"]),
    ):
        (ten / "test_batch").write_bytes(content)
        refused(f"cifar:{ten}:test", "test_batch", *words)
    dump_python2({"names": NAMES}, ten / "batches.meta")
    refused(f"cifar:{ten}", "batches.meta", "label_names")
