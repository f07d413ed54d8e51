"""Batch streams: the same tensors wherever they start, however many processes make them."""

import gc
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.data.datasets import ImageDataset, bad_images_summary, batches, ordered_batches
from genvision.data.order import SampleOrder, sample_indices, sample_positions
from genvision.data.sources import BadImageError, open_source
from genvision.data.transforms import ViewConfig, center_crop
from genvision.data.workers import map_in_order
from genvision.errors import UserError
from genvision.images import from_uint8

NUM = 10


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = tmp_path / "set" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 12, 3), dtype=np.uint8)).save(path)
    return open_source(f"folder:{tmp_path / 'set'}")


def damage(source, index):
    path = Path(source.name(index))
    path.write_bytes(path.read_bytes()[:80])


CROPS = {"random": {"crop": "random", "enlarge_range": (1.0, 3.0)}, "resized": {"crop": "resized"}}
"""Crops of which two are the same only by chance."""


def random_crops(source, **options):
    return ImageDataset(source, 8, crop="random", flip=True, seed=5, **options)


def take(stream, num):
    iterator = iter(stream)
    result = list(itertools.islice(iterator, num))
    iterator.close()
    return result


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def test_batches_have_the_promised_shapes_and_range(source):
    [batch] = take(batches(random_crops(source), seed=1, batch_size=4), 1)
    assert batch["images"].shape == (4, 3, 8, 8)
    assert batch["images"].dtype == torch.float32
    assert batch["images"].min() >= -1
    assert batch["images"].max() <= 1
    assert batch["labels"].dtype == batch["positions"].dtype == torch.int64
    assert batch["positions"].tolist() == [0, 1, 2, 3]
    indices = sample_indices(1, np.arange(4), NUM)
    assert batch["labels"].tolist() == source.labels[indices].tolist()


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_gives_the_same_tensors(source, crop, num_workers):
    data = ImageDataset(source, 8, crop=crop, seed=5)
    whole = take(batches(data, seed=1, batch_size=4), 7)
    rest = take(batches(data, seed=1, batch_size=4, start_step=4, num_workers=num_workers), 3)
    assert_same(rest, whole[4:])


def test_all_processes_together_see_what_one_sees(source):
    data = random_crops(source)
    whole = take(batches(data, seed=1, batch_size=6), 4)
    for world_size in (2, 3):
        parts = [take(batches(data, seed=1, batch_size=6, rank=rank, world_size=world_size), 4) for rank in range(world_size)]
        together = [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
        assert_same(together, whole)


def test_workers_give_what_the_process_itself_gives(source):
    stream = batches(random_crops(source), seed=1, batch_size=4, end_step=5, num_workers=2)
    here = batches(random_crops(source), seed=1, batch_size=4, end_step=5)
    assert_same(list(stream), list(here))
    assert_same(list(stream), list(here))  # and again from the start


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_all_processes_read_in_an_epoch_is_the_set_each_image_once(source, world_size, window):
    data = ImageDataset(source, 14, crop="center", flip=False, shuffle_window=window)
    streams = [batches(data, seed=1, batch_size=12, rank=rank, world_size=world_size, end_step=5) for rank in range(world_size)]
    read = [batch for stream in streams for batch in stream]
    positions, images = (torch.cat([batch[key] for batch in read]) for key in ("positions", "images"))
    for epoch in range(6):
        assert len(images[positions // NUM == epoch].flatten(1).unique(dim=0)) == NUM
    assert sorted(positions.tolist()) == list(range(6 * NUM))


def test_the_order_is_the_one_of_the_source(source):
    assert ImageDataset(source, 8).order == source.order() == SampleOrder(NUM)
    assert ImageDataset(source, 8, shuffle_window=4).order == SampleOrder(NUM, window=4)
    assert ImageDataset(source, 8).highest_label == 2


def test_flips_are_of_half_the_images_and_belong_to_the_position(source):
    plain, mirrored = (ImageDataset(source, 8, flip=flip, seed=2) for flip in (False, True))
    positions, indices = np.arange(200), np.zeros(200, dtype=int)
    a, b = (data.get_batch(positions, indices)["images"] for data in (plain, mirrored))
    is_flipped = (a != b).flatten(1).any(1)
    assert 70 < is_flipped.sum() < 130
    assert torch.equal(b[is_flipped], a[is_flipped].flip(-1))
    assert torch.equal(mirrored.get(17, 0)["images"], b[17])
    assert torch.equal(plain.plain(0), a[0])


@pytest.mark.parametrize("crop", CROPS)
def test_random_crops_change_from_epoch_to_epoch_and_with_the_seed(source, crop):
    data, other = (ImageDataset(source, 8, seed=seed, **CROPS[crop]) for seed in (5, 6))
    views = torch.stack([data.get(position, 3)["images"] for position in range(5)] + [other.get(0, 3)["images"]])
    assert len(views.flatten(1).unique(dim=0)) == 6
    assert torch.equal(data.get_batch(np.array([9, 3]), np.array([1, 3]))["images"][1], views[3])


def test_a_resized_crop_of_the_whole_area_is_the_resized_image(source):
    images = ImageDataset(source, 8, crop="resized", min_area=1.0, flip=False).get_batch(np.arange(3), np.arange(3))["images"]
    whole = [np.asarray(source.load(i).resize((8, 8), Image.Resampling.BICUBIC)) for i in range(3)]
    assert torch.equal(images, from_uint8(np.stack(whole)))
    parts = ImageDataset(source, 8, crop="resized", flip=False).get_batch(np.arange(3), np.arange(3))["images"]
    assert (parts != images).flatten(1).any(1).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_states_are_left_alone(source, num_workers):
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    take(batches(random_crops(source), seed=1, batch_size=4, num_workers=num_workers), 3)
    list(ordered_batches(source, 8, batch_size=4, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_stops_with_its_name_alone(source, num_workers):
    damage(source, 4)
    with pytest.raises(BadImageError) as caught:
        list(batches(random_crops(source), seed=1, batch_size=5, end_step=2, num_workers=num_workers))
    assert source.name(4) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_and_reported(source, crop, num_workers):
    damage(source, 4)
    damage(source, 5)
    data = ImageDataset(source, 8, crop=crop, seed=5, on_bad_image="skip")
    stream = batches(data, seed=1, batch_size=5, end_step=4, num_workers=num_workers)
    result = list(stream)
    assert sorted(stream.bad_images) == [4, 5]
    assert source.name(5) in stream.bad_images[5]
    indices = sample_indices(1, np.arange(20), NUM)
    indices[(indices == 4) | (indices == 5)] = 6
    assert torch.cat([batch["labels"] for batch in result]).tolist() == source.labels[indices].tolist()
    clean = take(batches(ImageDataset(source, 8, crop=crop, seed=5, on_bad_image="skip"), seed=1, batch_size=5), 4)
    assert_same(result, clean)


def test_nothing_readable_is_an_error_even_when_skipping(source):
    for index in range(NUM):
        damage(source, index)
    with pytest.raises(UserError, match="not one of its 10 images"):
        take(batches(random_crops(source, on_bad_image="skip"), seed=1, batch_size=2), 1)


def test_wrong_batch_sizes_are_refused_at_once(source):
    with pytest.raises(UserError, match="multiple of 4"):
        batches(random_crops(source), seed=0, batch_size=6, world_size=4)


def test_datasets_travel_to_other_processes(source):
    for crop in ("center", "random", "resized"):
        data = ImageDataset(source, 8, crop=crop, seed=5)
        positions = sample_positions(0, 4)
        before = data.get_batch(positions, positions)
        assert_same([pickle.loads(pickle.dumps(data)).get_batch(positions, positions)], [before])


def test_digits_stream_from_memory():
    data = ImageDataset(open_source("digits"), 16, flip=False)
    [first, second] = take(batches(data, seed=0, batch_size=64), 2)
    assert first["images"].shape == (64, 3, 16, 16)
    assert not torch.equal(first["images"], second["images"])
    again = data.get_batch(first["positions"].numpy(), sample_indices(0, first["positions"].numpy(), 1797))
    assert_same([again], [first])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pinned_batches_are_the_same(source, num_workers):
    pinned = take(batches(random_crops(source), seed=1, batch_size=4, num_workers=num_workers, pin_memory=True), 3)
    assert all(tensor.is_pinned() for batch in pinned for tensor in batch.values())
    assert_same(pinned, take(batches(random_crops(source), seed=1, batch_size=4), 3))


class TestTwoViews:
    @pytest.mark.parametrize("crop", CROPS)
    def test_the_first_is_what_one_view_is_and_the_second_has_a_crop_of_its_own(self, source, crop):
        one, two, other = (ImageDataset(source, 8, seed=seed, views=views, **CROPS[crop]) for seed, views in ((5, 1), (5, 2), (6, 2)))
        positions = np.arange(20)
        single, pairs = (data.get_batch(positions, positions % NUM) for data in (one, two))
        assert pairs["images"].shape == (20, 2, 3, 8, 8)
        assert_same([pairs | {"images": pairs["images"][:, 0]}], [single])
        again = other.get_batch(positions, positions % NUM)["images"]
        third = two.get_batch(positions + 20, positions % NUM)["images"]
        views = torch.cat([pairs["images"], again, third]).flatten(0, 1)
        assert len(views.flatten(1).unique(dim=0)) > 115  # of 120, some two of which may meet by chance

    @pytest.mark.parametrize("crop", CROPS)
    def test_each_has_a_flip_of_its_own(self, source, crop):
        positions, indices = np.arange(400), np.arange(400) % NUM
        plain, mirrored = (
            ImageDataset(source, 8, flip=flip, seed=2, views=2, **CROPS[crop]).get_batch(positions, indices)["images"]
            for flip in (False, True)
        )
        is_flipped = (plain != mirrored).flatten(2).any(2)
        assert torch.equal(mirrored[is_flipped], plain[is_flipped].flip(-1))
        for first, second in itertools.product((False, True), repeat=2):
            assert 65 < (is_flipped == torch.tensor([first, second])).all(1).sum() < 135  # of 100 expected

    @pytest.mark.parametrize("is_cached", [True, False])
    def test_of_a_centre_crop_the_second_is_the_mirror_image(self, source, is_cached, monkeypatch):
        monkeypatch.setattr("genvision.data.datasets.MAX_CACHE_BYTES", 1 << 20 if is_cached else 0)
        one, two = (ImageDataset(source, 8, seed=2, views=views).get_batch(np.arange(30), np.arange(30) % NUM) for views in (1, 2))
        assert_same([two | {"images": two["images"][:, 0]}], [one])
        assert torch.equal(two["images"][:, 1], two["images"][:, 0].flip(-1))
        with pytest.raises(UserError, match=r"data\.views 2: .* set data\.crop to random, or data\.flip to true"):
            ImageDataset(source, 8, flip=False, views=2)

    @pytest.mark.parametrize("crop", ["center", "random", "resized"])
    def test_starts_workers_and_processes_change_nothing(self, source, crop):
        data = ImageDataset(source, 8, crop=crop, seed=5, views=2)
        whole = take(batches(data, seed=1, batch_size=6), 5)
        assert_same(take(batches(data, seed=1, batch_size=6, start_step=3, num_workers=1), 2), whole[3:])
        parts = [take(batches(data, seed=1, batch_size=6, rank=rank, world_size=2), 5) for rank in range(2)]
        assert_same([{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)], whole)
        assert torch.equal(data.get(7, sample_indices(1, np.array([7]), NUM)[0])["images"], whole[1]["images"][1])


class TestOrdered:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_image_once_in_order(self, source, num_workers):
        parts = list(ordered_batches(source, 8, batch_size=4, num_workers=num_workers))
        assert [len(part["images"]) for part in parts] == [4, 4, 2]
        assert np.concatenate([part["indices"] for part in parts]).tolist() == list(range(NUM))
        np.testing.assert_array_equal(np.concatenate([part["labels"] for part in parts]), source.labels)
        images = np.concatenate([part["images"] for part in parts])
        assert images.dtype == np.uint8
        for index in range(NUM):
            np.testing.assert_array_equal(images[index], np.asarray(center_crop(source.load(index), 8)))

    def test_chosen_indices_and_views(self, source):
        [part] = ordered_batches(source, 8, batch_size=4, indices=np.array([7, 2]), views=ViewConfig(flip=True))
        assert part["indices"].tolist() == [7, 2]
        assert part["images"].shape == (2, 2, 8, 8, 3)
        np.testing.assert_array_equal(part["images"][:, 1], part["images"][:, 0, :, ::-1])

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_bad_images_are_left_out_and_listed(self, source, num_workers):
        for index in (3, 8, 9):
            damage(source, index)
        stream = ordered_batches(source, 8, batch_size=4, num_workers=num_workers, on_bad_image="skip")
        assert np.concatenate([part["indices"] for part in stream]).tolist() == [0, 1, 2, 4, 5, 6, 7]
        summary = bad_images_summary(stream.bad_images).splitlines()
        assert summary[0] == "3 unreadable images were skipped:"
        assert [source.name(index) in line for index, line in zip((3, 8, 9), summary[1:], strict=True)] == [True] * 3
        with pytest.raises(BadImageError):
            list(ordered_batches(source, 8, batch_size=4, num_workers=num_workers))

    def test_nothing_skipped_needs_no_summary(self):
        assert bad_images_summary({}) == ""
        assert bad_images_summary({2: "a.png: empty"}).splitlines() == ["1 unreadable image was skipped:", "  a.png: empty"]


class TestWorkers:
    def test_dropping_the_iterator_ends_them(self, source):
        iterator = iter(batches(random_crops(source), seed=1, batch_size=4, num_workers=2))
        next(iterator)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        del iterator
        gc.collect()
        assert not any(worker.is_alive() for worker in workers)
        assert not multiprocessing.active_children()

    def test_a_signal_to_the_group_leaves_them_at_work(self, source):
        iterator = iter(batches(random_crops(source), seed=1, batch_size=4, num_workers=2))
        first = next(iterator)
        workers = multiprocessing.active_children()
        for name in ("-TERM", "-INT", "-USR1"):
            subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
        time.sleep(0.1)
        assert all(worker.is_alive() for worker in workers)
        rest = list(itertools.islice(iterator, 10))
        iterator.close()
        assert_same([first, *rest], take(batches(random_crops(source), seed=1, batch_size=4), 11))

    def test_main_can_end_a_stuck_one(self):
        iterator = map_in_order(_sleep, [0, 60], 1)
        next(iterator)
        began = time.monotonic()
        [worker] = multiprocessing.active_children()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
        assert time.monotonic() - began < 5
        iterator.close()

    def test_a_killed_one_is_reported_in_one_line(self):
        iterator = map_in_order(_sleep, [0, 60], 1)
        next(iterator)
        [worker] = multiprocessing.active_children()
        threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()  # while we wait for the second
        with pytest.raises(UserError, match="lower num_workers") as caught:
            next(iterator)
        assert "\n" not in str(caught.value)

    def test_new_ones_go_on_where_one_was_killed(self, source, capfd):
        undisturbed = take(batches(random_crops(source), seed=1, batch_size=4), 12)
        iterator = iter(batches(random_crops(source), seed=1, batch_size=4, end_step=12, num_workers=2))
        result = []
        for batch in iterator:
            result.append(batch)
            if len(result) % 2:
                worker = multiprocessing.active_children()[len(result) // 2 % 2]
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()  # its end must not disturb what the main process does meanwhile
        assert_same(result, undisturbed)
        assert not multiprocessing.active_children()
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 6  # more than may come without a batch in between
        for step, line in zip((1, 3, 5, 7, 9, 11), lines, strict=True):
            assert re.fullmatch(rf"step {step}: .* died \(.*-9\); new ones go on from this step", line)

    def test_a_step_that_kills_every_worker_ends_the_stream_after_three_tries(self, source, capfd):
        with pytest.raises(UserError, match="lower num_workers"):
            take(batches(_KillsItsProcess(source, 8, crop="random"), seed=1, batch_size=4, start_step=5, num_workers=1), 1)
        lines = capfd.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["step 5"] * 3
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("name", ["-TERM", "-USR1"])
    def test_none_meets_a_signal_before_it_knows_how_to_take_it(self, name):
        for _ in range(3):
            iterator = map_in_order(abs, itertools.count(), 4)
            assert next(iterator) == 0  # of the first worker; the others may just have begun
            workers = multiprocessing.active_children()
            subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
            assert [next(iterator) for _ in range(20)] == list(range(1, 21))
            iterator.close()

    def test_a_bug_keeps_its_traceback(self):
        with pytest.raises(ZeroDivisionError, match="Traceback"):
            list(map_in_order(_divide, [1, 0], 1))

    def test_the_interpreter_ends_while_a_stream_is_open(self):
        code = (
            "from genvision.data.workers import map_in_order\n"
            "import itertools\n"
            "stream = map_in_order(abs, itertools.count(), 2)\n"
            "print(next(stream))\n"
            "import builtins; builtins.kept = stream\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "0\n")
        assert "Traceback" not in done.stderr


class _KillsItsProcess(ImageDataset):
    """As the system does when memory runs out."""

    def get_batch(self, positions, indices):
        os.kill(os.getpid(), signal.SIGKILL)


def _sleep(seconds):
    time.sleep(seconds)


def _divide(value):
    return 1 / value
