"""A real file system of a few bytes, for what happens when a disk is full."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

HELD = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && read -r _; umount -l "$2" 2>/dev/null'
"""Keeps the file system mounted until its standard input ends: at the latest with the process of the test, even if that is killed."""
AS_ROOT: Sequence[str] = ()
IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
"""For users that may not mount, where the kernel lets them have a namespace of their own."""


@contextmanager
def small_disk(num_bytes: int, mount_point: Path, ways: Sequence[Sequence[str]] = (AS_ROOT, IN_A_NAMESPACE)) -> Iterator[Path]:
    """A folder in which files may take up `num_bytes` (rounded up to whole pages) together; skips the test where none can be made.

    In a namespace it is seen through `/proc/PID/root`, which `Path.resolve` would leave for the empty `mount_point`.

    Args:
        mount_point: a new folder; empty again at the end.
        ways: tried in turn.
    """
    mount_point.mkdir()
    failures = []
    for way in ways:
        words = [*way, "sh", "-c", HELD, "sh", str(num_bytes), str(mount_point.absolute())]
        try:  # in a session of its own, so that a Ctrl-C at the terminal does not end it before the test
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        except FileNotFoundError as error:
            failures.append(f"{error.filename} is not there")
            continue
        assert process.stdout is not None
        if process.stdout.readline() != "mounted\n":
            failures.append(" ".join(process.communicate()[1].split()))
            continue
        try:
            yield Path(f"/proc/{process.pid}/root{mount_point.absolute()}") if way else mount_point
        finally:
            process.communicate(timeout=10)  # its input ends
        return
    pytest.skip(f"no small file system can be mounted here ({'; '.join(failures)})")
