"""The small disk of the tests is a real one: it fills up, and goes away."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_disk import AS_ROOT, IN_A_NAMESPACE, small_disk

WAIT = """
import sys, time
from pathlib import Path
from small_disk import small_disk
with small_disk(1 << 16, Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("way", [AS_ROOT, IN_A_NAMESPACE], ids=["as root", "in a namespace"])
def test_it_holds_so_many_bytes_and_not_one_more(way, tmp_path):
    with small_disk(1 << 16, tmp_path / "disk", [way]) as disk:
        (disk / "first").write_bytes(bytes(1 << 15))
        (disk / "second").write_bytes(bytes(1 << 15))
        with pytest.raises(OSError) as full:
            (disk / "third").write_bytes(b"1")
        assert full.value.errno == errno.ENOSPC
        (disk / "first").unlink()
        (disk / "third").write_bytes(b"1")
    assert not (disk / "third").exists()
    assert not os.path.ismount(tmp_path / "disk")


def test_it_is_unmounted_after_an_error(tmp_path):
    with pytest.raises(KeyError), small_disk(1 << 16, tmp_path / "disk") as disk:
        (disk / "file").write_text("text")
        raise KeyError
    assert not (disk / "file").exists()


def test_it_is_unmounted_when_the_process_of_the_test_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WAIT, str(tmp_path / "disk")], stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    assert process.stdout is not None
    if not process.stdout.readline():
        pytest.skip("no small file system can be mounted here")
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.ismount(tmp_path / "disk"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_way_that_does_not_work_skips_the_test_and_says_why(tmp_path):
    reasons = r"unshared is not there; .*(invalid|unrecognized) option"
    ways = [["unshared"], ["unshare", "--no-such-option"]]
    with pytest.raises(pytest.skip.Exception, match=reasons), small_disk(1 << 16, tmp_path / "disk", ways):
        pass
