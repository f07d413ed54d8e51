"""Encoded sets of millions of images in hundreds of files: memory, time and open files."""

import itertools
import multiprocessing
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from encoded_examples import write_codes

from genvision.data.array_files import SPARE_FILES
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset
from genvision.data.order import LARGE_SET_WINDOW
from genvision.errors import UserError

CLASSES = [str(label) for label in range(1000)]
READ = """
import sys
import time
import numpy as np
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

data = EncodedDataset(sys.argv[1])
indices = data.order.indices(0, np.arange(256))
data.get_batch(np.arange(256), np.zeros(256, dtype=int))
before, seconds = anonymous(), []
stream, began = iter(batches(data, seed=0, batch_size=256, end_step=200)), time.perf_counter()
for step in range(200):
    codes = next(stream)["codes"]
    seconds.append(time.perf_counter() - began)
    assert step or codes[:, 0, 0].tolist() == (indices % 65536).tolist()
    began = time.perf_counter()
print(len(data), anonymous(), np.median(seconds))
"""


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 24])
def test_what_all_processes_read_in_an_epoch_is_the_set_each_image_once(tmp_path, world_size, window):
    write_codes(tmp_path / "set", 101, shard_rows=30)
    data = EncodedDataset(tmp_path / "set", shuffle_window=window)
    epochs = [[], [], []]
    for rank in range(world_size):
        for batch in batches(data, seed=1, batch_size=12, rank=rank, world_size=world_size, end_step=26):
            for position, code in zip(batch["positions"].tolist(), batch["codes"][:, 0, 0].tolist(), strict=True):
                if position < 303:
                    epochs[position // 101].append(code)
    assert [sorted(epoch) for epoch in epochs] == [list(range(101))] * 3


def test_reading_a_million_images_costs_no_more_memory_than_their_window(tmp_path):
    write_codes(tmp_path / "set", 1_000_000, shard_rows=250_000, label_names=CLASSES)
    tracemalloc.start()
    data = EncodedDataset(tmp_path / "set", shuffle_window=1 << 14)
    opened, _ = tracemalloc.get_traced_memory()
    stream = iter(batches(data, seed=0, batch_size=256))
    for batch in itertools.islice(stream, 100):
        codes, labels = batch["codes"][:, 0, 0].numpy(), batch["labels"].numpy()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 200_000  # the labels alone have 8 MB
    assert kept < 400_000  # 4 bytes a sample of two windows
    assert peak < 3_000_000
    rows = data.order.indices(0, np.arange(99 * 256, 100 * 256))
    np.testing.assert_array_equal(codes, rows % (1 << 16))
    np.testing.assert_array_equal(labels, rows % 1000)
    np.testing.assert_array_equal(data.labels_of(rows), labels)
    assert data.class_counts.tolist() == [1000] * 1000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_fresh_process_reads_ten_million_images_in_the_memory_of_a_hundred_thousand(tmp_path):
    used = {}
    for num in (100_000, 10_000_000):
        write_codes(tmp_path / str(num), num, shard_rows=200_000, side=4, label_names=CLASSES)
        done = subprocess.run(
            [sys.executable, "-c", READ, str(tmp_path / str(num))], capture_output=True, text=True, timeout=120, check=True
        )
        length, kilobytes, seconds = map(float, done.stdout.split())
        assert length == num
        assert seconds < 0.02
        used[num] = kilobytes * 1024
    assert used[10_000_000] - used[100_000] < 2 * 4 * LARGE_SET_WINDOW + 4e6


class TestOpenFiles:
    """Of a process that may have few open."""

    @pytest.fixture
    def folder(self, tmp_path):
        write_codes(tmp_path / "set", 300, shard_rows=3)
        return tmp_path / "set"

    def test_the_limit_is_raised_as_far_as_the_shards_need_and_the_system_allows(self, folder):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = len(list(Path("/dev/fd").iterdir()))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 50, hard))
            assert len(EncodedDataset(folder).views(299)) == 1
            assert abs(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - (num_open + 200 + SPARE_FILES)) < 10
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_a_limit_that_is_high_enough_stays(self, folder):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        EncodedDataset(folder)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == before

    def test_a_system_that_does_not_allow_it_is_named(self, folder):
        fork = multiprocessing.get_context("fork")
        answers = fork.SimpleQueue()
        process = fork.Process(target=_open_with_few_files, args=(folder, answers))  # the limit cannot be raised again
        process.start()
        answer = answers.get()
        process.join()
        assert answer.startswith(f"{folder}: its 200 files must be open at once, but this process may open 300 in all; raise that")


def _open_with_few_files(folder, answers):
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
    with pytest.raises(UserError) as caught:
        EncodedDataset(folder)
    answers.put(str(caught.value))
