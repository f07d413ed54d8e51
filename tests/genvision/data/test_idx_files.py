"""IDX files, written as MNIST's and EMNIST's are."""

import gzip
import pickle

import numpy as np
import pytest
from refused_sources import refused

from genvision.data.sources import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)


def idx(array, magic=None):
    header = [0x00000801 + array.ndim - 1 if magic is None else magic, *array.shape]
    return np.array(header, dtype=">u4").tobytes() + array.tobytes()


def write(folder, images_name, labels=(2, 0, 1), images=IMAGES):
    folder.mkdir(exist_ok=True)
    labels_name = images_name.replace("images", "labels").replace("idx3", "idx1")
    for name, array in ((images_name, images), (labels_name, np.array(labels, dtype=np.uint8))):
        content = idx(array)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / images_name


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
def test_images_are_grey_and_have_the_labels_beside_them(tmp_path, name):
    path = write(tmp_path, name)
    for spec in (f"idx:{path}", f"idx:{tmp_path}"):
        source = open_source(spec)
        assert (source.labels.tolist(), source.label_names) == ([2, 0, 1], ["0", "1", "2"])
        for opened in (source, pickle.loads(pickle.dumps(source))):
            assert (opened.load(1).mode, opened.load(1).size) == ("RGB", (5, 4))
            np.testing.assert_array_equal(np.asarray(opened.load(1)), np.repeat(IMAGES[1][..., None], 3, axis=2))
    assert source.name(1) == f"{path}[1]"


def test_an_extracted_file_is_not_read_into_memory(tmp_path):
    source = open_source(f"idx:{write(tmp_path, 'train-images-idx3-ubyte')}")
    assert isinstance(source.files[0].images, np.memmap)
    assert len(pickle.dumps(source)) < 2000


def test_parts_are_found_by_their_names(tmp_path):
    write(tmp_path, "train-images-idx3-ubyte.gz")
    write(tmp_path, "train-images-idx3-ubyte")  # extracted beside the archive, as torchvision leaves it
    write(tmp_path, "t10k-images-idx3-ubyte.gz", labels=(1, 1, 1))
    assert open_source(f"idx:{tmp_path}:train").name(0).endswith("train-images-idx3-ubyte[0]")
    assert open_source(f"idx:{tmp_path}:test").labels.tolist() == [1, 1, 1]
    emnist = tmp_path / "emnist"
    write(emnist, "emnist-digits-train-images-idx3-ubyte")
    refused(f"idx:{emnist}:test", "no file of test images", "emnist-digits-train")
    write(emnist, "emnist-mnist-train-images-idx3-ubyte")
    refused(f"idx:{emnist}", "several files of train images", "give idx:FILE")


def test_emnist_stands_upright_and_its_letters_begin_at_0(tmp_path):
    path = write(tmp_path, "emnist-letters-train-images-idx3-ubyte.gz", labels=(1, 26, 2))
    source = open_source(f"idx:{path}")
    np.testing.assert_array_equal(np.asarray(source.load(2))[..., 0], IMAGES[2].T)
    assert source.labels.tolist() == [0, 25, 1]
    assert open_source(f"idx:{write(tmp_path, 'emnist-digits-test-images-idx3-ubyte')}").labels.tolist() == [2, 0, 1]
    mapping = tmp_path / "emnist-letters-mapping.txt"
    mapping.write_text("".join(f"{number} {64 + number} {96 + number}\n" for number in range(1, 27)))
    assert open_source(f"idx:{path}").label_names == [chr(code) for code in range(65, 91)]
    mapping.write_text("1 65\n2 66\n")
    refused(f"idx:{path}", "label 25", "2 classes")
    mapping.write_text("one\n")
    refused(f"idx:{path}", "mapping.txt", "cannot be read")
    mapping.unlink()
    refused(f"idx:{write(tmp_path, 'emnist-letters-test-images-idx3-ubyte')}", "label 0", "numbered from 1")


def test_what_is_missing_or_of_another_size_is_named(tmp_path):
    path = write(tmp_path, "train-images-idx3-ubyte")
    labels = tmp_path / "train-labels-idx1-ubyte"
    refused(f"idx:{labels}", "no IDX file of images", "00000803")
    labels.write_bytes(idx(np.zeros(2, dtype=np.uint8)))
    refused(f"idx:{path}", "has 2 labels", "3 images")
    labels.unlink()
    refused(f"idx:{path}", "no labels beside it")
    for content in (idx(IMAGES)[:-1], idx(IMAGES) + b"x"):
        path.write_bytes(content)
        refused(f"idx:{path}", f"has {len(content)} bytes, expected 76 for [3, 4, 5] images")
    path.write_bytes(idx(IMAGES[:0]))
    refused(f"idx:{path}", "[0, 4, 5]")
    path.write_bytes(np.array([0x803, 2**31, 2**31, 2**31], dtype=">u4").tobytes())
    refused(f"idx:{path}", "has 16 bytes")
    for content in (b"", b"\0\0", b"\0\0\x08\x03\0"):
        path.write_bytes(content)
        refused(f"idx:{path}", "train-images-idx3-ubyte")
    write(tmp_path, "t10k-images-idx3-ubyte.gz")
    archive = tmp_path / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    refused(f"idx:{archive}", "cannot be read")
    archive.write_bytes(gzip.compress(idx(IMAGES) + bytes(1 << 20)))
    refused(f"idx:{archive}", "has more than 76 bytes, expected 76")
    archive.write_bytes(gzip.compress(np.array([0x803, 2**31, 2**31, 2**31], dtype=">u4").tobytes()))
    refused(f"idx:{archive}", "t10k-images", "download it again")
    (tmp_path / "empty").mkdir()
    refused(f"idx:{tmp_path}/empty", "no IDX file of images in it")
    refused(f"idx:{tmp_path}/none", "no such file")
