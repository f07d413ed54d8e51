"""Images on their way to the disk: threads encode and write them while the next batch is drawn.

Threads, not processes: zlib and the disk release the interpreter's lock, and nothing has to be copied.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from genvision.processes import available_cores

CHUNKS = 2
"""Chunks that may be on their way at once, so that memory stays bounded: one is written, and one waits lest the threads have nothing to do
when the next is late. More would not help: where writing is slower than drawing, a queue of any length is full."""
MAX_THREADS = 4
"""That write, and no more than half the cores: on a CPU the sampler wants them, too."""


class Writer(Protocol):
    """What writes the images of a job."""

    def files(self, chunk: range, images: np.ndarray) -> list[Callable[[], None]]:
        """What writes each file of a chunk; in any order, on any thread."""


class OutputQueue:
    """A context in which images are written by threads; when it is left, all of them are on the disk.

    What a thread meets (a full disk, say) is raised by the next `put`, or at the end. When the context is left by an exception, files that
    are being written are finished, and those that wait are dropped.

    Args:
        writer: prepared.
        count: called with the number of images of each chunk that is wholly on the disk, by the thread that uses the queue.
        num_threads: that write; as many as make sense unless told.
    """

    def __init__(self, writer: Writer, count: Callable[[int], None], num_threads: int | None = None) -> None:
        self.writer, self.count = writer, count
        num_threads = num_threads or max(1, min(MAX_THREADS, available_cores() // 2))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="output")
        self._under_way: deque[tuple[range, list[Future[None]]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._threads.shutdown(cancel_futures=True)

    def put(self, chunk: range, images: np.ndarray) -> None:
        """Hand over the images of a chunk, uint8 [B, H, W, 3], which nobody changes afterwards; waits while too many are on their way.

        Raises:
            Exception: what a thread met with this chunk or one before.
        """
        self._settle(CHUNKS - 1)
        self._under_way.append((chunk, [self._threads.submit(write) for write in self.writer.files(chunk, images)]))

    def _settle(self, at_most: int) -> None:
        """Count the chunks that have arrived, and wait until at most so many are on their way."""
        while self._under_way:
            chunk, files = self._under_way[0]
            must_wait = len(self._under_way) > at_most
            finished, _ = wait(files, timeout=None if must_wait else 0, return_when=FIRST_EXCEPTION)
            for file in finished:
                file.result()
            if len(finished) < len(files):
                return
            self._under_way.popleft()
            self.count(len(chunk))
