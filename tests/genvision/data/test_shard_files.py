"""Bytes of shards, near and far."""

import errno
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import genvision.data.shard_files as shard_files
from genvision.data.open_files import MAX_OPEN, open_file
from genvision.data.shard_files import ShardFiles
from genvision.errors import UserError


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(shard_files, "WAITS", (0.0, 0.0))
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/wds/{name}.tar": f"this is {name}".encode() for name in ("a", "b", "c")})
    yield fs
    fs.rm("/wds", recursive=True)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_text(f"this is {name}")
    return tmp_path


def test_near_and_far_shards_are_read_alike(memory, folder):
    for files in (ShardFiles(str(folder)), ShardFiles("memory://wds/{a,b,c}.tar"), ShardFiles(f"file://{folder}/*.tar")):
        assert [files.read(shard, 5, 4) for shard in range(len(files))] == [b"is a", b"is b", b"is c"]
        assert files.sizes.tolist() == [9, 9, 9]
        assert files.read(1, 3, 0) == b""
        with files.stream(2) as file:
            assert (file.read(4), file.seek(8), file.read()) == (b"this", 8, b"c")
        assert files.read_beside("classes.txt") is None
    assert not ShardFiles("memory://wds/a.tar").is_local


def test_few_files_stay_open_over_all_data_sets_and_none_crosses_a_pickle(folder):
    for number in range(MAX_OPEN):
        (folder / f"x{number}.tar").write_text(f"{number:09d}")
    sets = [ShardFiles(str(folder)), ShardFiles(f"{folder}/x*.tar")]
    open_file.cache_clear()
    descriptors = Path("/proc/self/fd")
    before = len([*descriptors.iterdir()]) if descriptors.is_dir() else None
    for files in sets:
        assert [files.read(shard, 0, 9).decode() for shard in range(len(files))] == [Path(path).read_text() for path in files.paths]
    assert open_file.cache_info().currsize == MAX_OPEN
    if before is not None:
        assert len([*descriptors.iterdir()]) == before + MAX_OPEN
    assert pickle.loads(pickle.dumps(sets[0])).read(2, 8, 1) == b"c"


def test_threads_that_drive_out_one_anothers_files_read_the_right_ones(folder, monkeypatch):
    monkeypatch.setattr(shard_files, "open_file", lru_cache(1)(open_file.__wrapped__))
    files = ShardFiles(str(folder))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = [*pool.map(lambda shard: {files.read(shard, 8, 1) for _ in range(3000)}, range(3))]
    finally:
        sys.setswitchinterval(interval)
    assert found == [{b"a"}, {b"b"}, {b"c"}]


def test_a_forked_process_opens_its_own(memory):
    files = ShardFiles("memory://wds/a.tar")
    mine = files._filesystem()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(files.read, (0, 5, 4)) == b"is a"
        assert pool.apply(_found_again, (files,)) is True
    assert files._filesystem() is mine


def _found_again(files):
    files._filesystem()
    return files._found[0] == os.getpid()


def test_a_changed_shard_stops_the_run(memory, folder):
    near, far = ShardFiles(str(folder)), ShardFiles("memory://wds/a.tar")
    near.check_unchanged(0)
    far.check_unchanged(0)
    (folder / "a.tar").write_text("longer than before")
    memory.pipe("/wds/a.tar", b"longer than before")
    for action in (lambda: near.read(0, 0, 4), lambda: near.check_unchanged(0), lambda: far.check_unchanged(0)):
        with pytest.raises(UserError, match=r"a\.tar: has changed since it was opened"):
            action()
    near.read(1, 0, 4)
    for content in ("short", "longer than before"):  # under the hands of a process that has it open
        (folder / "b.tar").write_text(content)
        with pytest.raises(UserError, match="has changed"):
            near.read(1, 0, 5)


def test_a_failing_network_is_tried_again_and_then_named(memory, monkeypatch):
    files = ShardFiles("memory://wds/a.tar")
    answers = [OSError(errno.ECONNRESET, "connection reset"), b"too few", b"this is a", RuntimeError("no\nroute"), b"", OSError("gone")]

    def cat_file(self, path, start=None, end=None, **kwargs):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert files.read(0, 0, 9) == b"this is a"
    with pytest.raises(UserError, match=r"memory:///wds/a\.tar: cannot be read \(gone\); check the address, the network"):
        files.read(0, 0, 9)
    assert not answers


def test_addresses_that_cannot_be_opened_say_why(memory, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    (folder / "d.tar").mkdir()
    for address, words in {
        "s3://bucket/{0..3}.tar": r"pip install fsspec\[s3\]",
        "simplecache::https://host/x.tar": r"pip install fsspec\[http\]",
        "nosuch://x.tar": "Protocol not known: nosuch",
        "blockcache::memory://wds/a.tar": "only simplecache::",
        "memory://wds/{a,z}.tar": r"z\.tar: no such file",
        f"{folder}/{{a,z}}.tar": r"z\.tar: no such file",
        f"{folder}/*.tar": r"d\.tar: is a folder",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            ShardFiles(address)
        assert "\n" not in str(caught.value)


def test_simplecache_copies_a_shard_once_for_all_processes(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path))
    files = ShardFiles("simplecache::memory://wds/*.tar")
    assert not files.is_local
    assert not (tmp_path / "shards").exists()
    assert [files.read(shard, 5, 4) for shard in range(3)] == [b"is a", b"is b", b"is c"]
    assert len([*(tmp_path / "shards").glob("*.tar")]) == 3
    again = ShardFiles("simplecache::memory://wds/*.tar")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: pytest.fail("read from afar again"))
    assert again.read(2, 5, 4) == b"is c"
    monkeypatch.undo()
    monkeypatch.setenv("GENVISION_CACHE", str(tmp_path))
    memory.pipe("/wds/a.tar", b"this is another")
    assert ShardFiles("simplecache::memory://wds/a.tar").read(0, 5, 10) == b"is another"


def test_a_copy_that_does_not_fit_is_named_and_leaves_nothing(memory, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(fsspec.config.conf, "simplecache", {"cache_storage": str(tmp_path / "file" / "below")})
    with pytest.raises(UserError, match=r"cannot hold a copy of memory:///wds/a\.tar"):
        ShardFiles("simplecache::memory://wds/a.tar").read(0, 0, 4)
