"""One run at a time in a folder: a lock that the kernel releases when its process dies, however it dies."""

import errno
import json
import os
import socket
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from genvision.errors import UserError

if sys.platform != "win32":
    import fcntl

NAME = "run.lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without locks answer: NFS without its lock service, Lustre mounted without `flock`."""
PATIENCE = 0.5
"""Seconds before another process is believed to hold the lock: `is_held` takes it for an instant, and the dead are buried in a moment."""


class RunLock:
    """Held by the main process of a run for its whole life, as a context manager.

    The file `run.lock` stays when the run ends; only the lock on it says whether one is on. It holds host, pid and start time of the newest
    run as JSON. Where the file system knows no locks there is a warning instead.

    Args:
        folder: of the run; made if it is not there.

    Raises:
        UserError: another run, in this process or another one, holds it; or the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def __enter__(self) -> "RunLock":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # not truncated before the lock is got: until then it belongs to the other run
            self._handle = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
            self._lock()
            self._sign()
        except OSError as error:
            self._close()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); make room, or choose another output_dir") from error
        except BaseException:
            self._close()
            raise
        # A flock belongs to the open file, which forked data workers inherit: they would hold it for the seconds that they outlive a killed
        # run. (A record lock of fcntl.lockf is not inherited, but lost as soon as this process closes any other handle of the file.)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _lock(self) -> None:
        assert self._handle is not None
        deadline = time.monotonic() + PATIENCE
        while (free := _try_lock(self._handle, exclusively=True)) is False:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder}: another run is in this folder ({_owner(self._handle)}); stop it, or choose another output_dir"
                )
            time.sleep(PATIENCE / 20)
        if free is None:
            why = "this file system knows no locks, so nothing keeps a second run out of the folder"
            print(f"warning: {self.folder / NAME}: {why}", file=sys.stderr, flush=True)

    def _sign(self) -> None:
        assert self._handle is not None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        os.ftruncate(self._handle, 0)
        os.write(self._handle, json.dumps(owner).encode())

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def is_held(folder: Path) -> bool:
    """Whether a run is on in this folder; False where it cannot be known, for want of a lock file or of locks."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _try_lock(handle, exclusively=False) is False
    finally:
        os.close(handle)


def _try_lock(handle: int, *, exclusively: bool) -> bool | None:
    """Whether the lock was got; None where there are none."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _owner(handle: int) -> str:
    """Who wrote the file, in words."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "its process has not yet written its number"  # between taking the lock and writing
