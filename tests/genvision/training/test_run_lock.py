"""Two runs never share a folder, and a dead one never keeps it."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_disk import small_disk

from genvision.errors import UserError
from genvision.training.run_lock import NAME, RunLock, is_held

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import os, sys, time
from pathlib import Path
from genvision.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else None
    if not child:
        print(os.getpid(), flush=True)
    time.sleep(60)  # the child as a data worker that has not yet noticed that its parent is dead
    os._exit(0)
"""


def hold(folder: Path, fork: bool = False) -> tuple[subprocess.Popen, str]:
    """A process that holds the lock, and the pid of the child that it forked, or its own."""
    words = [sys.executable, "-c", HOLD, str(folder), "fork" if fork else ""]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_second_run_is_refused_in_one_line_that_names_the_first(tmp_path):
    process, _ = hold(tmp_path)
    try:
        assert is_held(tmp_path)
        with pytest.raises(UserError) as refused, RunLock(tmp_path):
            pass
        message = str(refused.value)
        assert "\n" not in message
        assert str(tmp_path) in message and f"process {process.pid} on {socket.gethostname()}" in message
    finally:
        process.kill()
        process.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_the_lock_is_free_at_once_when_its_process_was_killed_though_a_forked_child_lives(tmp_path):
    process, child = hold(tmp_path, fork=True)
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        assert not is_held(tmp_path)
        with RunLock(tmp_path):
            assert time.monotonic() - started < 0.4
        os.kill(int(child), 0)  # it lives
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_child_that_is_forked_and_ends_leaves_the_lock_with_its_parent(tmp_path):
    with RunLock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert is_held(tmp_path)
        with pytest.raises(UserError, match="another run"), RunLock(tmp_path):
            pass
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_a_run_waits_for_a_process_that_looks_whether_the_lock_is_held(tmp_path):
    (tmp_path / NAME).touch()
    handle = os.open(tmp_path / NAME, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as is_held does, for longer
    threading.Timer(0.1, os.close, [handle]).start()
    with RunLock(tmp_path):
        assert is_held(tmp_path)


def test_a_folder_without_a_run_is_not_held(tmp_path):
    assert not is_held(tmp_path)
    assert not (tmp_path / NAME).exists()
    (tmp_path / NAME).write_text("")
    assert not is_held(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\)"), RunLock(tmp_path / "file" / "run"):
        pass


def test_where_there_are_no_locks_a_run_is_warned_and_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path):
        assert not is_held(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / NAME}: ") and "knows no locks" in line


def test_a_full_disk_is_named(tmp_path):
    with small_disk(1 << 14, tmp_path / "disk") as folder:
        (folder / NAME).touch()
        with pytest.raises(OSError, match="No space"):
            (folder / "rest").write_bytes(bytes(1 << 20))
        with pytest.raises(UserError, match=r"No space left on device"), RunLock(folder):
            pass
        assert not is_held(folder)


def test_the_lock_is_not_inherited_by_programs_that_are_started(tmp_path):
    with RunLock(tmp_path):
        process = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert not is_held(tmp_path)
        assert stat.S_ISREG((tmp_path / NAME).stat().st_mode)
    finally:
        process.kill()
        process.wait()
