"""Downsampled ImageNet: the set with labels as pickles and npz, the set without as PNG, npz and npy."""

import pickle

import numpy as np
import pytest
from PIL import Image
from refused_sources import refused

from genvision.data.sources import open_source

WNIDS = [f"n{90_000_000 - number * 1000:08d}" for number in range(1000)]
"""In the order of map_clsloc.txt, which here is sorted backwards."""
COLOURS = [(250, 128, 5), (1, 2, 3)]


def rows(size, num=2):
    """[num, 3 * size * size], all red values first; image i is of one colour but for its last pixel in the first row, which is white."""
    images = np.array([COLOURS[number % 2] for number in range(num)], dtype=np.uint8)[:, :, None, None] * np.ones((size, size), np.uint8)
    images[:, :, 0, -1] = 255
    return images.reshape(num, -1)


def write_pickle(folder, name, labels, size=32):
    folder.mkdir(exist_ok=True)
    batch = {"data": rows(size, len(labels)), "labels": labels, "mean": np.zeros(3 * size * size)}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=3))


def write_map(folder):
    (folder / "map_clsloc.txt").write_text("".join(f"{wnid} {number} kit_fox\n" for number, wnid in enumerate(WNIDS, start=1)))


def check_pixels(source, size):
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for number, colour in enumerate(COLOURS):
            image = np.asarray(opened.load(number))
            assert image.shape == (size, size, 3)
            assert image[0, -1].tolist() == [255, 255, 255]
            assert (image[1:] == colour).all()


def test_pickles_come_in_the_order_of_their_numbers_with_sorted_wnids(tmp_path, capsys):
    for number in range(1, 11):
        write_pickle(tmp_path, f"train_data_batch_{number}", [number, 1000])
    write_pickle(tmp_path, "val_data", [1, 500, 1000])
    write_map(tmp_path)
    source = open_source(f"imagenet32:{tmp_path}")
    assert source.labels.tolist()[::2] == [999 - number for number in range(10)] and set(source.labels[1::2]) == {0}
    assert source.label_names == sorted(WNIDS)
    assert source.name(19) == f"{tmp_path}/train_data_batch_10[1]"
    assert open_source(f"imagenet32:{tmp_path}:val").labels.tolist() == [999, 500, 0]
    assert capsys.readouterr().err == ""
    check_pixels(source, 32)


def test_without_the_map_labels_keep_their_order_and_it_says_so(tmp_path, capsys):
    write_pickle(tmp_path, "train_data_batch_1", [1, 1000], size=64)
    source = open_source(f"imagenet64:{tmp_path}")
    assert source.labels.tolist() == [0, 999]
    assert source.label_names[999] == "clsloc 1000"
    warning, note = capsys.readouterr().err.splitlines()
    assert "1 of the 10 training files" in warning
    assert "map_clsloc.txt" in note and "beside train_data_batch_1" in note
    check_pixels(source, 64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_lie_in_the_folders_of_their_archives(tmp_path, save, capsys):
    for number, place in ((1, "part1_npz"), (2, "part2_npz")):
        (tmp_path / place).mkdir()
        save(tmp_path / place / f"train_data_batch_{number}.npz", data=rows(32), labels=np.array([number, 7]), mean=np.zeros(3))
    write_map(tmp_path)
    source = open_source(f"imagenet32:{tmp_path}")
    assert source.labels.tolist() == [999, 993, 998, 993]
    assert isinstance(source.files[1].images, np.memmap) == (save is np.savez)
    check_pixels(source, 32)


def interleaved(size):
    return rows(size).reshape(2, 3, size, size).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("size", "name", "images"),
    [
        (32, "imagenet32-valid.npy", rows(32).reshape(2, 3, 32, 32)),
        (32, "imagenet32-valid.npy", rows(32)),
        (64, "imagenet64-valid.npy", interleaved(64)),
        (64, "imagenet64-valid.npy", interleaved(64).reshape(2, -1)),
        (32, "imgnet_32x32.npz", interleaved(32)),
    ],
)
def test_the_set_without_labels_is_one_class_in_each_of_its_forms(tmp_path, size, name, images, capsys):
    if name.endswith("npz"):
        np.savez(tmp_path / name, trainx=images[:1], testx=images)
        assert len(open_source(f"imagenet{size}:{tmp_path}")) == 1
    else:
        np.save(tmp_path / name, images)
        refused(f"imagenet{size}:{tmp_path}", "no train images", f"imagenet{size}-train.npy")
    source = open_source(f"imagenet{size}:{tmp_path}:val")
    assert (source.labels.tolist(), source.label_names) == ([0, 0], [f"valid_{size}x{size}"])
    assert isinstance(source.files[0].images, np.memmap)
    check_pixels(source, size)
    assert capsys.readouterr().err == ""


def test_png_folders_are_one_class_in_the_order_of_names(tmp_path):
    for part in ("train", "valid"):
        (tmp_path / f"{part}_32x32").mkdir()
        for number, image in enumerate(interleaved(32), start=1):
            Image.fromarray(image).save(tmp_path / f"{part}_32x32" / f"{number:07d}.png")
    source = open_source(f"imagenet32:{tmp_path}")
    assert (source.label_names, source.name(1)) == (["train_32x32"], f"{tmp_path}/train_32x32/0000002.png")
    check_pixels(source, 32)
    assert open_source(f"imagenet32:{tmp_path}:val").label_names == ["valid_32x32"]
    write_pickle(tmp_path, "val_data", [1])
    refused(f"imagenet32:{tmp_path}:val", "val_data (with labels) and valid_32x32 (without)")


def test_files_of_another_size_number_or_label_are_named(tmp_path):
    write_pickle(tmp_path, "train_data_batch_1", [1, 2], size=64)
    refused(f"imagenet32:{tmp_path}", "train_data_batch_1", "expected uint8 [N, 3072] (32 x 32 pixels); give imagenet64:")
    refused(f"imagenet64:{tmp_path}/train_data_batch_1", "is a file", "imagenet64:DIR")
    refused(f"imagenet64:{tmp_path}:test", "no part 'test'")
    refused(f"imagenet64:{tmp_path}:val", "no val images of 64 x 64", "val_data")
    write_pickle(tmp_path, "train_data_batch_3", [1, 2], size=64)
    refused(f"imagenet64:{tmp_path}", "train_data_batch_2 is missing")
    write_pickle(tmp_path / "part2", "train_data_batch_3", [1, 2], size=64)
    refused(f"imagenet64:{tmp_path}", "is there twice")
    for wrong in (0, 1001):
        write_pickle(tmp_path, "val_data", [1, wrong])
        refused(f"imagenet32:{tmp_path}:val", "val_data", f"the label {wrong}, expected 1 to 1000")
    (tmp_path / "map_clsloc.txt").write_text("n02119789 1 kit_fox\n")
    write_pickle(tmp_path, "val_data", [1])
    refused(f"imagenet32:{tmp_path}:val", "map_clsloc.txt", "has 1 lines")
    (tmp_path / "map_clsloc.txt").write_text("kit_fox\n")
    refused(f"imagenet32:{tmp_path}:val", "map_clsloc.txt", "cannot be read")


class Foreign:
    pass


def test_arrays_that_would_run_something_or_are_damaged_are_refused(tmp_path):
    (tmp_path / "val_data").write_bytes(pickle.dumps({"data": rows(32), "labels": [1, Foreign()]}))
    refused(f"imagenet32:{tmp_path}:val", "val_data", "wants to run", "Foreign")
    (tmp_path / "val_data").unlink()
    path = tmp_path / "val_data.npz"
    np.savez(path, data=rows(32), labels=np.array([1, None], dtype=object))
    refused(f"imagenet32:{tmp_path}:val", "val_data.npz", "allow_pickle")
    np.savez(path, data=rows(32))
    refused(f"imagenet32:{tmp_path}:val", "val_data.npz", "labels")
    path.write_bytes(path.read_bytes()[:-50])
    refused(f"imagenet32:{tmp_path}:val", "val_data.npz", "cannot be read")
    path.unlink()
    path = tmp_path / "imagenet32-valid.npy"
    for images, words in (
        (rows(32).astype(np.float32), ["float32", "expected uint8 [N, 32, 32, 3]"]),
        (interleaved(64), ["uint8 [2, 64, 64, 3]", "give imagenet64:"]),
        (np.uint8(1), ["is uint8 []"]),
        (np.array([None, {}]), ["cannot be read"]),
    ):
        np.save(path, images)
        refused(f"imagenet32:{tmp_path}:val", "imagenet32-valid.npy", *words)
    path.write_bytes(path.read_bytes()[:10] + b"(" * 200)
    refused(f"imagenet32:{tmp_path}:val", "imagenet32-valid.npy", "cannot be read")
    path.write_bytes(path.read_bytes()[:20])
    refused(f"imagenet32:{tmp_path}:val", "imagenet32-valid.npy", "cannot be read")
