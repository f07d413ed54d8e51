"""Tar shards as a source: samples, order, exact positions over processes, and what happens to damaged data."""

import io
import pickle

import fsspec
import numpy as np
import pytest
from PIL import Image
from shard_examples import png, samples, tar_bytes, write_shards

from genvision.data.datasets import ImageDataset, batches
from genvision.data.order import SampleOrder
from genvision.data.sources import BadImageError, open_source
from genvision.errors import UserError


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "set", 26, 4)


@pytest.fixture
def memory(shards):
    fs = fsspec.filesystem("memory")
    fs.put(str(shards), "/far", recursive=True)
    yield "memory://far"
    fs.rm("/far", recursive=True)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def refused(spec, *words):
    with pytest.raises(UserError) as caught:
        open_source(str(spec))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("form", ["{near}", "{near}/train-*.tar", "{far}", "{far}/train-{{0000..0003}}.tar"])
def test_holds_every_sample_in_order(shards, memory, form):
    source = open_source("wds:" + form.format(near=shards, far=memory))
    assert len(source) == 26
    for index in (0, 5, 6, 13, 25):
        image = source.load(index)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels(png(index)))
    assert source.labels.tolist() == [index % 3 for index in range(26)]
    assert source.labels.dtype == np.int64
    assert source.label_names == ["0", "1", "2"]
    assert source.name(6).endswith("train-0001.tar: 000006.png")
    assert source.encoded_bytes() == sum(len(png(index)) for index in range(26))
    assert source.stored_formats() == {"PNG": 26}
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(np.asarray(again.load(25)), pixels(png(25)))


def test_hashes_follow_content_and_order_not_the_place(shards, memory):
    near, far = open_source(f"wds:{shards}"), open_source(f"wds:{memory}")
    assert near.fingerprint() == far.fingerprint()
    content_hash = near.content_hash()
    assert content_hash == far.content_hash()
    reordered = open_source(f"wds:{shards}/train-{{0003,0002,0001,0000}}.tar")
    assert reordered.fingerprint() != near.fingerprint()
    assert reordered.content_hash() != content_hash
    members = samples(0, 6) | {"000003.png": png(77)}
    assert len(png(77)) == len(png(3))
    (shards / "train-0000.tar").write_bytes(tar_bytes(members))
    changed = open_source(f"wds:{shards}")
    assert changed.fingerprint() == near.fingerprint()
    assert changed.content_hash() != content_hash


@pytest.mark.parametrize("num_shards", [1, 5])
def test_processes_share_an_epoch_without_overlap_and_resume_exactly(tmp_path, num_shards):
    source = open_source(f"wds:{write_shards(tmp_path / 'set', 24, num_shards)}")
    dataset = ImageDataset(source, 6, crop="random")

    def steps(world_size, num_workers, start=0):
        """[(images, labels)] of all processes together, from step `start` to 6."""
        options = {"seed": 3, "batch_size": 8, "start_step": start, "end_step": 6, "world_size": world_size, "num_workers": num_workers}
        streams = [batches(dataset, rank=rank, **options) for rank in range(world_size)]
        parts = [*zip(*streams, strict=True)]
        return [[np.concatenate([part[key].numpy() for part in step]) for key in ("images", "labels")] for step in parts]

    alone = steps(1, 0)
    for other in (steps(2, 0), steps(2, 2)):
        for one, two in zip(alone, other, strict=True):
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])
    for one, two in zip(alone[4:], steps(2, 0, start=4), strict=True):
        np.testing.assert_array_equal(one[0], two[0])
    order = dataset.order.indices(3, np.arange(48))
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24))


def test_remote_shards_are_shuffled_in_smaller_windows(shards, memory):
    near, far = open_source(f"wds:{shards}"), open_source(f"wds:{memory}")
    assert near.order() == SampleOrder(26)
    assert near.order(8) == SampleOrder(26, 8)
    assert far.order() == SampleOrder(26, 1 << 16, 256)
    assert far.order(8) == SampleOrder(26, 8, 256)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "ant\nbee\nwater flea\nyak\n"),
        ("classes.txt", "\ufeffant \r\nbee\r\nwater flea\r\n yak\r\n"),
        ("label_names.json", '["ant", "bee", "water flea", "yak"]'),
        ("label_names.json", '{"label_names": ["ant", "bee", "water flea", "yak"]}'),
        ("dataset_info.json", '{"features": {"x": {}, "cls": {"names": ["ant", "bee", "water flea", "yak"], "_type": "ClassLabel"}}}'),
    ],
)
def test_names_of_classes_lie_beside_the_shards(shards, name, content):
    (shards / name).write_bytes(content.encode())
    assert open_source(f"wds:{shards}").label_names == ["ant", "bee", "water flea", "yak"]


def test_without_labels_all_are_of_one_class(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.png": png(0), "b.png": png(1)}))
    (tmp_path / "y.tar").write_bytes(tar_bytes({}))
    source = open_source(f"wds:{tmp_path}")
    assert source.label_names == ["all"]
    assert source.labels.tolist() == [0, 0]


def test_sets_that_cannot_be_used_are_refused(shards, tmp_path):
    (shards / "classes.txt").write_text("ant\nbee\n")
    refused(f"wds:{shards}", "label 2", "names for 2 classes only")
    (shards / "classes.txt").unlink()
    for content in ("{}", '{"label_names": {"0": "ant"}}', '"ant"', "[1, 2, 3]", "[" * 100_000):
        (shards / "label_names.json").write_text(content)
        refused(f"wds:{shards}", "label_names.json", "mend or remove it")
    (shards / "label_names.json").unlink()
    (shards / "train-0002.tar").write_bytes(tar_bytes({"a.png": png(0)}))
    refused(f"wds:{shards}", "train-0002.tar: its samples have no label", "train-0000.tar have")
    (tmp_path / "empty.tar").write_bytes(tar_bytes({}))
    refused(f"wds:{tmp_path}/empty.tar", "hold no samples")
    (tmp_path / "test.tar").write_bytes(tar_bytes({"a.png": png(0), "a.cls": b"-1"}))
    refused(f"wds:{tmp_path}/test.tar", "label -1")


@pytest.mark.parametrize("place", ["near", "far"])
def test_a_damaged_image_is_named_by_shard_and_key(shards, memory, place):
    damaged = tar_bytes(samples(0, 2) | {"deep/" + "k" * 120 + ".png": png(2)[:60], "deep/" + "k" * 120 + ".cls": b"0"})
    (shards / "train-0000.tar").write_bytes(damaged)
    fsspec.filesystem("memory").pipe("/far/train-0000.tar", damaged)
    source = open_source(f"wds:{shards if place == 'near' else memory}/train-0000.tar")
    with pytest.raises(BadImageError, match=r"train-0000\.tar: deep/k{95}: cannot be read as an image") as caught:
        source.load(2)
    assert caught.value.reason
    dataset = ImageDataset(source, 6, on_bad_image="skip")
    assert dataset.get(0, 2)["labels"].item() == 0
    assert [*dataset.bad_images] == [2]


def test_a_shard_that_changes_under_a_run_is_no_bad_image(shards):
    source = open_source(f"wds:{shards}")
    source.load(0)
    path = shards / "train-0000.tar"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)
    with pytest.raises(UserError, match="has changed since it was opened") as caught:
        source.load(0)
    assert not isinstance(caught.value, BadImageError)
    assert "train-0000.tar: image at byte " in source.name(1)


def test_memory_is_twenty_bytes_a_sample(tmp_path):
    for name, num in (("few", 100), ("many", 1100)):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes({f"a-rather-long-key-{i}.png": b"x" for i in range(num)}))
    few, many = (len(pickle.dumps(open_source(f"wds:{tmp_path}/{name}.tar"))) for name in ("few", "many"))
    assert (many - few) / 1000 == pytest.approx(20, abs=0.1)  # offset, size and label
