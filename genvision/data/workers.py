"""Worker processes that compute ahead, in order; a worker that dies says so."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory as pin

from genvision.errors import UserError

K = TypeVar("K")
V = TypeVar("V")


class DeadWorkerError(UserError):
    """A worker process ended before its work was done."""

    def __init__(self, reason: str) -> None:
        self.what = f"a process that decodes images died ({' '.join(reason.split())[:200]})"
        super().__init__(
            f"{self.what}; it may have run out of memory or of shared memory (/dev/shm): lower num_workers, or raise the limit"
        )


def map_in_order(function: Callable[[K], V], keys: Iterable[K], num_workers: int, *, pin_memory: bool = False) -> Generator[V, None, None]:
    """function(key) for every key, in order, computed ahead by worker processes if `num_workers` is not 0.

    A UserError in a worker is raised here as itself. No global random state is touched. Workers end with the generator.

    Args:
        pin_memory: tensors in what comes back are page-locked; by a thread, where there are workers.

    Raises:
        DeadWorkerError: a worker has died; when the next value is asked for, never in the midst of the caller's work.
    """
    if num_workers == 0:
        values = map(function, keys)
        yield from map(pin, values) if pin_memory else values
        return
    loader = DataLoader(
        _Mapped(function),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_is,
        worker_init_fn=_obey_main_alone,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
        pin_memory=pin_memory,
    )
    with _deaths_named():
        iterator = _started(loader)
    try:
        while True:
            try:
                with _deaths_named(), _deaths_noticed(iterator):
                    result = next(iterator)
            except StopIteration:
                return
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        # not left to the garbage collector: it may close the queues first, and then ending takes five seconds a worker
        iterator._shutdown_workers()


def _started(loader: DataLoader[Any]) -> Any:
    """Its iterator, with workers of which PyTorch's handler of SIGCHLD does not know."""
    with _signals_held():  # a worker must not meet a signal before it has said how it takes them
        iterator: Any = iter(loader)
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False  # so that it does not remove them again when it ends
    return iterator


@contextmanager
def _deaths_named() -> Iterator[None]:
    """What PyTorch raises of a dead worker becomes a DeadWorkerError."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # its tensors are fetched from the worker itself, hence the connection; an exception of the function itself begins with "Caught"
        is_connection = not isinstance(error, RuntimeError) and not str(error).startswith("Caught")
        if not is_connection and not str(error).startswith(("DataLoader worker", "Pin memory thread")):
            raise
        raise DeadWorkerError(str(error) or type(error).__name__) from error


@contextmanager
def _deaths_noticed(iterator: Any) -> Iterator[None]:
    """PyTorch's handler of SIGCHLD raises as soon as a worker dies, wherever the main process is then; let it do so only in here.

    In the midst of a training step the error would end the run.
    """
    signal_handling._set_worker_pids(id(iterator), tuple(worker.pid for worker in iterator._workers))
    try:
        dead = [worker for worker in iterator._workers if not worker.is_alive()]  # since the last time
        if dead:
            raise RuntimeError(f"DataLoader worker (pid {dead[0].pid}) ended with status {dead[0].exitcode}")
        yield
    finally:
        signal_handling._remove_worker_pids(id(iterator))


class _Mapped(Dataset[Any]):
    """A function as a data set; a UserError travels back as a value, since the loader would wrap it in a traceback."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.function(key)
        except UserError as error:
            return error


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end a process wait until the end of the block, also in processes that begin in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_main_alone(_: int) -> None:
    """A signal to the whole process group must not end a worker: the main process finishes its step and needs it until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows; SLURM's warning before it ends a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_end_when_main_says, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def _end_when_main_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _as_is(value: Any) -> Any:
    return value
