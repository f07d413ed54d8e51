"""LSUN's lmdb folders: what is read, by whom, and what is left behind."""

import io
import multiprocessing
import os
import pickle
import sys
import time

import numpy as np
import pytest
from PIL import Image
from refused_sources import refused

from genvision.data import lsun
from genvision.data.datasets import ordered_batches
from genvision.data.sources import BadImageError, open_source

lmdb = pytest.importorskip("lmdb")

FORMATS = ("JPEG", "WEBP", "JPEG")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A cache and a working directory that stay empty if nobody writes there."""
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def encoded(seed, form="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


def key(number):
    return b"%040x" % number


@pytest.fixture
def write(tmp_path):
    def write(name, values):
        """An lmdb folder of {key: value}, without its lock file, like an unpacked archive."""
        folder = tmp_path / "lsun" / name
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            for one, value in values.items():
                transaction.put(one, value)
        (folder / "lock.mdb").unlink()
        return folder

    return write


@pytest.fixture
def bedrooms(write):
    return write("bedroom_train_lmdb", {key(9 - i): encoded(i, form) for i, form in enumerate(FORMATS)})


def test_images_come_in_the_order_of_their_keys(bedrooms):
    source = open_source(f"lsun:{bedrooms}")
    assert (source.labels.tolist(), source.label_names) == ([0, 0, 0], ["bedroom"])
    for place, seed in enumerate((2, 1, 0)):  # keys 7, 8, 9
        expected = Image.open(io.BytesIO(encoded(seed, FORMATS[seed]))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(source.load(place)), np.asarray(expected))
    assert source.name(0) == f"{bedrooms}: key {key(7).decode()}"
    assert source.stored_formats() == {"JPEG": 2, "WebP": 1}


def test_two_workers_read_all_while_this_process_has_it_open_too(bedrooms):
    source = open_source(f"lsun:{bedrooms}")
    source.load(0)
    batches = list(ordered_batches(source, 16, batch_size=1, num_workers=2))
    assert [batch["indices"].tolist() for batch in batches] == [[0], [1], [2]]
    for index, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["images"][0], np.asarray(source.load(index)))


def test_no_file_appears_beside_the_database_or_in_the_working_directory(bedrooms, tmp_path):
    source = open_source(f"lsun:{bedrooms}")
    source.load(1)
    assert [path.name for path in bedrooms.iterdir()] == ["data.mdb"]
    assert not list((tmp_path / "work").iterdir())
    assert len(list((tmp_path / "cache" / "shard_indexes").glob("*.npy"))) == 1


def test_keys_are_listed_once_and_again_after_a_change(bedrooms, tmp_path, capsys):
    index = tmp_path / "cache" / "shard_indexes"
    open_source(f"lsun:{bedrooms}")
    assert "listing" in capsys.readouterr().err
    assert len(open_source(f"lsun:{bedrooms}")) == 3
    assert "listing" not in capsys.readouterr().err
    next(index.glob("*.npy")).write_bytes(b"cut off")
    assert len(open_source(f"lsun:{bedrooms}")) == 3
    assert capsys.readouterr().err.count("is damaged") == 1
    stat = (bedrooms / "data.mdb").stat()
    os.utime(bedrooms / "data.mdb", ns=(0, 0))
    open_source(f"lsun:{bedrooms}")
    os.utime(bedrooms / "data.mdb", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` leaves another one
    open_source(f"lsun:{bedrooms}")
    assert len(list(index.glob("*.npy"))) == 3


def test_one_of_several_processes_lists_the_keys_and_the_first_shows_it(bedrooms, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    open_source(f"lsun:{bedrooms}")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("RANK", "0")
    list_keys = lsun._Table._list_keys
    monkeypatch.setattr(lsun._Table, "_list_keys", lambda *table: time.sleep(0.1) or list_keys(*table))
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=lambda: len(open_source(f"lsun:{bedrooms}"))) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert capfd.readouterr().err.count("listing") == 1


def test_scenes_have_the_order_of_the_benchmark_and_objects_the_order_given(write):
    tower, church = write("tower_val_lmdb", {key(1): encoded(1)}), write("church_outdoor_val_lmdb", {key(2): encoded(2)})
    more, cats = write("tower_train_lmdb", {key(3): encoded(3)}), write("cat", {key(4): encoded(4)})
    scenes = open_source(f"lsun:{tower},{church},{more}")
    assert (scenes.labels.tolist(), scenes.label_names) == ([1, 0, 1], ["church_outdoor", "tower"])
    assert scenes.name(1).startswith(f"{church}: ")
    objects = open_source(f"lsun:{tower},{cats},{church}")
    assert (objects.labels.tolist(), objects.label_names) == ([0, 1, 2], ["tower", "cat", "church_outdoor"])


def test_hashes_see_what_they_promise(write):
    values = {key(i): encoded(i) for i in range(2)}
    first = open_source(f"lsun:{write('a_lmdb', values)}")
    same = open_source(f"lsun:{write('b_lmdb', values)}")
    bytes_swapped = open_source(f"lsun:{write('c_lmdb', {key(0): values[key(1)], key(1): values[key(0)]})}")
    assert first.fingerprint() == same.fingerprint()
    assert first.content_hash() == same.content_hash() != bytes_swapped.content_hash()
    assert first.fingerprint() != open_source(f"lsun:{write('d_lmdb', {key(0): values[key(0)]})}").fingerprint()
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(np.asarray(copy.load(1)), np.asarray(first.load(1)))


def test_corrupt_value_fails_by_its_key(write):
    source = open_source(f"lsun:{write('tower_lmdb', {key(1): encoded(1), key(2): encoded(2)[:60], key(3): b''})}")
    source.load(0)
    for index in (1, 2):
        with pytest.raises(BadImageError, match=rf"tower_lmdb: key 0+{index + 1}: cannot be read as an image"):
            source.load(index)


def test_what_cannot_be_used_is_refused(bedrooms, write, tmp_path, monkeypatch):
    refused(f"lsun:{tmp_path}/none_lmdb", "none_lmdb", "no data.mdb")
    refused(f"lsun:{bedrooms.parent}", "for example", "bedroom_train_lmdb")
    refused(f"lsun:{write('empty_lmdb', {})}", "holds no images")
    broken = write("broken_lmdb", {key(1): encoded(1)})
    (broken / "data.mdb").write_bytes(b"no database" * 1000)
    refused(f"lsun:{broken}", "cannot be opened", "download")
    cut = write("cut_lmdb", {key(i): os.urandom(5000) for i in range(9)})
    os.truncate(cut / "data.mdb", 20000)
    refused(f"lsun:{cut}", "is cut off", "20000 of")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    refused(f"lsun:{cut}", "pip install genvision[lsun]")
