"""Images are written by threads while others are drawn: the same files, bounded memory, and an end when something is wrong."""

import os
import resource
import signal
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from started_processes import finish, start

from genvision.cli import main
from genvision.errors import UserError
from genvision.jobs.image_writers import FileWriter, FolderWriter, open_writer
from genvision.jobs.output_queue import CHUNKS, OutputQueue
from genvision.jobs.sample import SampleRequest

CHUNK_LIST = [range(4), range(4, 8), range(8, 10)]
REQUEST = SampleRequest(num=10, classes=(0, 1))


def images_of(chunk: range, side: int = 8) -> np.ndarray:
    return np.stack([np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8) for i in chunk])


def prepared(out: Path) -> FolderWriter | FileWriter:
    writer = open_writer(out, {"seed": 0}, ["a", "b"], REQUEST)
    writer.prepare()
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Gate:
    """A writer whose files are written only when it is opened; what it holds of a chunk it lets go as soon as it is written."""

    def __init__(self) -> None:
        self.open, self.started, self.written = threading.Event(), threading.Event(), []

    def files(self, chunk, images):
        return [lambda i=i: self._write(i) for i in chunk]

    def _write(self, index: int) -> None:
        self.started.set()
        assert self.open.wait(30)
        self.written.append(index)


class TestQueue:
    @pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
    def test_any_number_of_threads_writes_the_same_bytes(self, tmp_path, name):
        found = []
        for num_threads in (None, 1, 3):  # None: no queue at all
            folder = tmp_path / str(num_threads)
            folder.mkdir()
            writer, counted = prepared(folder / name), []
            if num_threads is None:
                for chunk in CHUNK_LIST:
                    writer.write(chunk, images_of(chunk))
            else:
                with OutputQueue(writer, counted.append, num_threads) as queue:
                    for chunk in CHUNK_LIST:
                        queue.put(chunk, images_of(chunk))
                assert counted == [4, 4, 2]
            assert all(map(writer.has, CHUNK_LIST))
            writer.finish(CHUNK_LIST)
            found.append(contents(folder))
        assert found[0] == found[1] == found[2] and len(found[0]) >= 2

    def test_the_caller_goes_on_until_two_chunks_are_under_way_and_counts_what_is_on_the_disk(self):
        writer, counted, order = Gate(), [], []

        def draw() -> None:
            with OutputQueue(writer, counted.append, 2) as queue:
                for chunk in CHUNK_LIST:
                    queue.put(chunk, np.zeros(0))
                    order.append(chunk)

        drawing = threading.Thread(target=draw)
        drawing.start()
        assert writer.started.wait(30)
        drawing.join(0.2)
        assert drawing.is_alive() and order == CHUNK_LIST[:CHUNKS] and counted == []
        writer.open.set()
        drawing.join(30)
        assert not drawing.is_alive()
        assert order == CHUNK_LIST and counted == [4, 4, 2] and sorted(writer.written) == list(range(10))

    def test_memory_is_bounded(self, tmp_path):
        handed_over, most = [], 0
        with OutputQueue(prepared(tmp_path / "out"), lambda num: None, 1) as queue:
            for i in range(20):
                images = images_of(range(i, i + 1), side=64)
                handed_over.append(weakref.ref(images))
                queue.put(range(i, i + 1), images)
                most = max(most, sum(reference() is not None for reference in handed_over))
        del images
        assert most <= CHUNKS + 1  # one that is on the disk, and that its thread is about to let go
        assert all(reference() is None for reference in handed_over)

    def test_leaving_by_an_exception_drops_what_waits(self):
        writer = Gate()
        with pytest.raises(KeyboardInterrupt), OutputQueue(writer, lambda num: None, 1) as queue:
            queue.put(CHUNK_LIST[0], np.zeros(0))
            queue.put(CHUNK_LIST[1], np.zeros(0))
            assert writer.started.wait(30)
            threading.Timer(0.05, writer.open.set).start()
            raise KeyboardInterrupt
        assert writer.written == [0]  # which was being written


class TestFailures:
    def test_a_full_disk_ends_the_job_at_the_next_chunk_and_leaves_no_half_file(self, tmp_path):
        """Files of more than 5,000 bytes cannot be written, as on a full disk: an image of noise has 12,000, a black one 100."""
        out = tmp_path / "out"
        writer, put = prepared(out), []
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            with pytest.raises(OSError, match="File too large"), OutputQueue(writer, lambda num: None, 2) as queue:
                queue.put(range(1), np.zeros((1, 64, 64, 3), dtype=np.uint8))
                for i in range(1, 9):
                    queue.put(range(i, i + 1), images_of(range(i, i + 1), side=64))
                    put.append(i)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(put) <= CHUNKS
        assert sorted(path.name for path in out.iterdir()) == ["000000.png", "job.json"]

    @pytest.mark.parametrize("name", ["out", "out.npz"])
    def test_a_folder_that_is_removed_ends_the_job(self, tmp_path, name):
        writer = prepared(tmp_path / name)
        written = tmp_path / ("out" if name == "out" else "out.npz.parts")
        with pytest.raises(UserError, match="was removed while the job wrote into it"), OutputQueue(writer, lambda num: None, 2) as queue:
            queue.put(CHUNK_LIST[0], images_of(CHUNK_LIST[0]))
            while not writer.has(CHUNK_LIST[0]):
                time.sleep(0.001)
            written.rename(tmp_path / "elsewhere")
            queue.put(CHUNK_LIST[1], images_of(CHUNK_LIST[1]))
        assert not written.exists()

    @pytest.mark.parametrize("name", ["out", "out.npz"])
    def test_a_job_whose_files_are_gone_is_not_finished(self, tmp_path, name):
        writer = prepared(tmp_path / name)
        for chunk in CHUNK_LIST:
            writer.write(chunk, images_of(chunk))
        next(path for path in tmp_path.rglob("00000*.*") if path.suffix in (".png", ".npy")).unlink()
        with pytest.raises(UserError, match="are gone; run the same command again"):
            writer.finish(CHUNK_LIST)

    def test_a_path_that_cannot_be_written_is_told_in_one_line(self, tiny_model, tmp_path, capsys):
        words = ["sample", "--model", str(tiny_model), "--num", "4", "--batch-size", "1", "--out", str(tmp_path / "out")]
        main(words)
        (tmp_path / "out" / "000002.png").unlink()
        (tmp_path / "out" / "000002.png").mkdir()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genvision:")]
        assert len(lines) == 1 and "000002.png" in lines[0] and lines[0].endswith("choose another path")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_job_that_has_only_whole_files(number, code, tiny_model, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    words = ["sample", "--model", str(tiny_model), "--num", "100000", "--batch-size", "4", "--out", str(out)]
    processes = start(words, num=1, errors=said)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < 10 and processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(processes[0].pid, number)
    assert finish(processes, seconds=20) == [code], Path(f"{said}.0").read_text()
    if number == signal.SIGINT:
        assert Path(f"{said}.0").read_text().splitlines()[-1] == "genvision: interrupted"
        assert not list(out.glob(".*.part"))
    pictures = list(out.glob("*.png"))
    assert len(pictures) >= 10
    for path in pictures:
        Image.open(path).load()
