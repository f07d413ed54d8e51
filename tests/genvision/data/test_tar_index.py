"""The index of tar shards: where images lie, and what makes a shard unusable."""

import io
import json
import multiprocessing
import os
import tarfile

import numpy as np
import pytest
from shard_examples import png, samples, tar_bytes, write_shards

from genvision.data import tar_index
from genvision.data.shard_files import ShardFiles
from genvision.data.tar_index import index_shards, index_tar
from genvision.errors import UserError


def index_of(data: bytes):
    return index_tar(io.BytesIO(data), "x.tar", len(data))


def contents(data: bytes) -> list[bytes]:
    index = index_of(data)
    return [data[offset : offset + size] for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)]


def refused(data: bytes, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        index_of(data)
    message = str(caught.value)
    assert message.startswith("x.tar: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_understood(form):
    deep = "train/" + "/".join(["class"] * 8) + "/../x"
    long = deep if form == tarfile.USTAR_FORMAT else deep + "y" * 300 + "é"
    members = {f"{deep}.png": png(0), f"{deep}.cls": b" 2\n", f"{long}z.JPEG": png(1), f"{long}z.cls": b"0"}
    data = tar_bytes(members, form)
    assert contents(data) == [png(0), png(1)]
    assert index_of(data).labels.tolist() == [2, 0]


def test_what_is_no_sample_is_passed_over():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        folder = tarfile.TarInfo("a.folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", "._a.png", "__about__.json", "a.png", "b.seg.png", "b.png", "b.txt", "c.image.png"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    assert contents(file.getvalue()) == [b"a.png", b"b.png", b"c.image.png"]
    assert index_of(file.getvalue()).labels is None
    assert contents(tar_bytes({})) == []


@pytest.mark.parametrize(
    "members",
    [
        {"a.cls": b"5", "a.png": b""},
        {"a.json": b'{"label": 5}', "a.png": b""},
        {"a.json": b'{"caption": "x", "class_index": "5"}', "a.png": b""},
        {"a.json": b'{"label": 1}', "a.png": b"", "a.cls": b"5"},
    ],
)
def test_labels_are_in_cls_or_else_in_json(members):
    assert index_of(tar_bytes(members)).labels.tolist() == [5]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.cls": b"0", "a.png": b"", "b.png": b""}, ("sample 'b' has no label", "'a' has one")),
        ({"a.png": b"", "b.png": b"", "b.json": b'{"label": 0}'}, ("sample 'b' has a label", "'a' has none")),
        ({"a.png": b"", "b.png": b"", "a.cls": b"0", "b.cls": b"0"}, ("sample 'a' has no image", "--sort=name")),
        ({"a.png": b"", "a.jpg": b""}, ("sample 'a' has two images ('png', 'jpg')",)),
        ([("a.png", b""), ("a.png", b"")], ("sample 'a' has two images",)),
        ({"d/a\nb.txt": b""}, (r"sample 'd/a\nb' has no image, only '.txt'",)),
        ({"a.png": b"", "a.cls": b"tench"}, ("'tench' as its label (.cls)", "number of a class")),
        ({"a.png": b"", "a.json": b'{"label": true}'}, ("'True' as its label (.json under 'label')",)),
        ({"a.png": b"", "a.json": b"{"}, ("sample 'a' has a .json that cannot be read",)),
        ({"a.png": b"", "a.json": b"[" * 100_000}, ("sample 'a' has a .json that cannot be read",)),
        ({"a.png": b"", "a.cls": b"99999999999999999999"}, ("as its label",)),
    ],
)
def test_a_sample_without_exactly_one_image_and_a_label_like_the_others_is_refused(members, words):
    refused(tar_bytes(members), *words)


def test_links_are_refused():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "../../secret"
        tar.addfile(info)
    refused(file.getvalue(), "'a.png' is a link", "--hard-dereference")


def test_a_shard_that_is_cut_off_is_named_with_place_and_count():
    data = tar_bytes(samples(0, 4))
    offsets = index_of(data).offsets.tolist()
    place = f"begin at byte {offsets[2]}"
    refused(data[: offsets[2] + 40], "cut off in member '000002.png'", place, "after 2 whole samples", "download it again")
    end = offsets[3] + len(png(3)) + -len(png(3)) % 512
    for cut in range(0, end + 1, 256):  # nowhere is anything left out without a word
        refused(data[:cut])
    refused(data[:end], f"ends at byte {end} without an end mark")
    assert len(index_of(data[: end + 512]).offsets) == 4


def test_a_damaged_header_is_not_taken_for_the_end():
    data = bytearray(tar_bytes(samples(0, 4)))
    offset = int(index_of(bytes(data)).offsets[2])
    data[offset - 512 + 3] ^= 1
    refused(bytes(data), f"damaged header at byte {offset - 512}", "after 2 whole samples")
    refused(tar_bytes(samples(0, 2)) + tar_bytes(samples(2, 4)), "behind its end mark", "not with cat")


@pytest.mark.parametrize(("data", "words"), [(b"\x1f\x8b\x08\x00", "compressed (gzip)"), (b"text" * 300, "not a tar"), (b"", "not a tar")])
def test_other_files_are_refused(data, words):
    refused(data, words)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "cache"))
    return write_shards(tmp_path / "set", 6, 3)


def test_a_second_opening_reads_no_shard_and_a_changed_one_is_read_again(shards, monkeypatch):
    first = index_shards(ShardFiles(str(shards)))
    read = []
    monkeypatch.setattr(tar_index, "index_tar", lambda file, url, size: (read.append(url), index_tar(file, url, size))[1])
    second = index_shards(ShardFiles(str(shards)))
    assert read == []
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.offsets, two.offsets)
        np.testing.assert_array_equal(one.sizes, two.sizes)
        np.testing.assert_array_equal(one.labels, two.labels)
    changed = shards / "train-0001.tar"
    changed.write_bytes(tar_bytes(samples(10, 13)))
    assert [len(index.offsets) for index in index_shards(ShardFiles(str(shards)))] == [2, 3, 2]
    assert read == [str(changed)]
    stat = changed.stat()
    copy = shards / "copy"
    copy.write_bytes(changed.read_bytes())
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and time, as `rsync -t` leaves it
    copy.replace(changed)
    index_shards(ShardFiles(str(shards)))
    assert read == [str(changed)] * 2


def test_a_damaged_index_is_made_again(shards, tmp_path, capfd):
    files = ShardFiles(str(shards))
    index_shards(files)
    one, two, three = sorted((tmp_path / "cache" / "shard_indexes").iterdir())
    one.write_bytes(one.read_bytes()[:-8])
    content = bytearray(two.read_bytes())
    content[-3] ^= 1
    two.write_bytes(content)
    three.write_bytes(b"")
    capfd.readouterr()
    assert [index.labels.tolist() for index in index_shards(files)] == [[0, 1], [2, 0], [1, 2]]
    assert capfd.readouterr().err.count("is damaged") == 3
    index_shards(files)
    assert capfd.readouterr().err == ""


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(shards, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "file" / "below"))
    assert len(index_shards(ShardFiles(str(shards)))) == 3
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "indexed again next time" in warnings[0]


def test_json_labels_in_the_wrong_shape_are_no_labels():
    assert index_of(tar_bytes({"a.png": b"", "a.json": json.dumps(["label", 1]).encode()})).labels is None


def test_processes_that_index_at_once_agree(shards):
    files = ShardFiles(str(shards))
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        found = pool.map(_offsets, [files] * 8, chunksize=1)
    assert all(offsets == found[0] for offsets in found)


def _offsets(files):
    return [index.offsets.tolist() for index in index_shards(files)]
