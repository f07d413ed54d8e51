"""Encoded data sets: what is written, in which memory, and that no interruption can spoil it."""

import json
import multiprocessing
import os
import signal
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from encoding_examples import NUM, SHARD, SIZE, LinearTokenizer, ListTokenizer, MeanTokenizer, contents, encode, open_images
from PIL import Image

from genvision.data import array_files
from genvision.data.encoded import EncodedDataset
from genvision.data.sources import BadImageError, open_source
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.images import from_uint8


@pytest.fixture
def source(tmp_path):
    return open_images(tmp_path / "set")


def damage(source, index):
    with open(source.name(index), "r+b") as file:  # noqa: PTH123
        file.truncate(70)


@pytest.mark.parametrize("options", [{"flip": False}, {"flip": True}, {"crops": "ten", "enlarge": 1.25}])
def test_every_view_of_every_image_is_encoded(source, tmp_path, options):
    index = encode(source, tmp_path / "out", **options)
    data = EncodedDataset(tmp_path / "out")
    views = ViewConfig(**{"flip": True, **options})
    assert len(data) == index["num_images"] == NUM
    assert data.num_views == index["views"] == views.num_views
    assert (data.code_shape, data.codebook_size, data.label_names) == ((2, 2), 64, ["a", "b"])
    np.testing.assert_array_equal(data.labels, source.labels)
    for i in range(NUM):
        images = np.stack([np.asarray(view) for view in views.apply(source.load(i), SIZE)])
        assert torch.equal(data.views(i), MeanTokenizer().encode(from_uint8(images)))
    assert index["source"] == source.spec
    assert index["source_fingerprint"] == source.fingerprint()
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["index.json", "job.json", *(f"{kind}-0000{i}.npy" for kind in ("codes", "labels") for i in range(3))]
    )


def test_no_batch_is_larger_than_asked(source, tmp_path):
    tokenizer = MeanTokenizer()
    encode(source, tmp_path / "out", tokenizer, batch_size=5)
    assert max(tokenizer.batch_sizes) == 4  # two images of two views


@pytest.mark.parametrize(("codebook_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_codes_take_the_smallest_numbers_that_hold_them(source, tmp_path, codebook_size, dtype):
    tokenizer = ListTokenizer(np.linspace(0, codebook_size - 1, 257).astype(int).tolist(), codebook_size)
    index = encode(source, tmp_path / "out", tokenizer, image_size=40)
    assert np.load(tmp_path / "out" / "codes-00000.npy").dtype == dtype
    assert (index["stored_as"], index["num_codes_in_use"]) == ("numbers", min(257, codebook_size))
    data = EncodedDataset(tmp_path / "out")
    expected = tokenizer.encode(from_uint8(np.asarray(ViewConfig().apply(source.load(0), 40)[0])[None]))
    assert torch.equal(data.views(0)[:1], expected)


def test_codes_may_be_sequences(source, tmp_path):
    encode(source, tmp_path / "out", MeanTokenizer(flat=True))
    data = EncodedDataset(tmp_path / "out")
    assert data.code_shape == (4,)
    assert data.get(0, 0)["codes"].shape == (4,)


def test_a_code_outside_the_codebook_is_a_bug(source, tmp_path):
    class Wrong(MeanTokenizer):
        def encode(self, images):
            return super().encode(images) + self.spec.codebook_size

    with pytest.raises(AssertionError, match="outside its codebook"):
        encode(source, tmp_path / "out", Wrong())


class TestLatents:
    @pytest.mark.parametrize("flat", [False, True])
    def test_they_come_back_bit_by_bit(self, source, tmp_path, flat):
        tokenizer = MeanTokenizer(None, flat=flat)
        index = encode(source, tmp_path / "out", tokenizer)
        data = EncodedDataset(tmp_path / "out")
        places = (4,) if flat else (2, 2)
        assert (index["kind"], index["dtype"], data.codebook_size, data.code_shape) == ("latents", "float32", None, (2, *places))
        for i in range(NUM):
            images = np.stack([np.asarray(view) for view in ViewConfig(flip=True).apply(source.load(i), SIZE)])
            assert torch.equal(data.views(i), tokenizer.encode(from_uint8(images)))
        batch = data.get_batch(np.arange(6), np.arange(6))
        assert batch["codes"].dtype == torch.float32
        assert batch["codes"].shape == (6, 2, *places)

    def test_float16_takes_half_the_space(self, source, tmp_path):
        whole = encode(source, tmp_path / "whole", MeanTokenizer(None))
        half = encode(source, tmp_path / "half", MeanTokenizer(None), dtype="float16")
        assert whole["bytes_per_image"] == 2 * half["bytes_per_image"] == 2 * 2 * 4 * 4
        latents, rounded = EncodedDataset(tmp_path / "whole").views(3), EncodedDataset(tmp_path / "half").views(3)
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, latents.half().float())
        assert not torch.equal(rounded, latents)

    def test_latents_that_no_number_can_hold_are_refused_by_image(self, source, tmp_path):
        tokenizer = LinearTokenizer(latent_std=1e-6)
        with pytest.raises(UserError, match=r"00\.png: its latents are NaN, infinite or too large for float16; encode with dtype float32"):
            encode(source, tmp_path / "half", tokenizer, dtype="float16")
        encode(source, tmp_path / "whole", tokenizer)
        torch.nn.init.constant_(tokenizer.down.bias, torch.nan)
        with pytest.raises(UserError, match=r"00\.png.*the tokenizer is broken"):
            encode(source, tmp_path / "out", tokenizer)

    def test_options_of_the_other_kind_are_refused(self, source, tmp_path):
        with pytest.raises(UserError, match="storage bytes is for discrete codes"):
            encode(source, tmp_path / "out", MeanTokenizer(None), storage="bytes")
        with pytest.raises(UserError, match="dtype float16 is for continuous latents"):
            encode(source, tmp_path / "out", dtype="float16")
        with pytest.raises(UserError, match="dtype 'float64' is unknown; choose one of float32, float16"):
            encode(source, tmp_path / "out", MeanTokenizer(None), dtype="float64")
        assert not (tmp_path / "out").exists()

    def test_they_are_not_taken_for_codes(self, source, tmp_path):
        encode(source, tmp_path / "out", MeanTokenizer(None))
        with pytest.raises(UserError, match="kind latents, now it is codes"):
            encode(source, tmp_path / "out")
        with pytest.raises(UserError, match="dtype float32, now it is float16"):
            encode(source, tmp_path / "out", MeanTokenizer(None), dtype="float16")


class TestStorage:
    @staticmethod
    def entries(num):
        return [40_000 - 90 * i for i in range(num)]

    @pytest.mark.parametrize(
        ("num", "storage", "form"),
        [(1, "auto", "ranks"), (256, "auto", "ranks"), (256, "bytes", "ranks"), (257, "auto", "numbers"), (257, "bytes", "bytes")],
    )
    def test_codes_are_stored_small_and_read_as_they_were(self, source, tmp_path, num, storage, form):
        tokenizer = ListTokenizer(self.entries(num), 40_001)
        index = encode(source, tmp_path / "out", tokenizer, image_size=24, storage=storage)
        assert (index["stored_as"], index["num_codes_in_use"]) == (form, num)
        data = EncodedDataset(tmp_path / "out", seed=1)
        for i in (0, 3, 4, NUM - 1):
            images = np.stack([np.asarray(view) for view in ViewConfig(flip=True).apply(source.load(i), 24)])
            assert torch.equal(data.views(i), tokenizer.encode(from_uint8(images)))
        batch = data.get_batch(np.arange(50), np.arange(50) % NUM)
        for row in range(50):
            assert torch.equal(batch["codes"][row], data.get(row, row % NUM)["codes"])
        names = {"ranks": ["ranks"], "numbers": ["codes"], "bytes": ["bytes", "starts"]}[form]
        assert {path.name.split("-")[0] for path in (tmp_path / "out").glob("*.npy")} == {"labels", *names}
        if form == "ranks":
            assert index["bytes_per_image"] == 2 * 24 * 24
        if form == "bytes":
            streams = [np.load(path) for path in sorted((tmp_path / "out").glob("bytes-*.npy"))]
            num_escaped = sum(int((data.views(i) >= sorted(self.entries(num))[255]).sum()) for i in range(NUM))
            assert sum(map(len, streams)) == NUM * 2 * 24 * 24 + num_escaped
            assert all(stream.dtype == np.uint8 for stream in streams)

    def test_more_codes_than_the_stream_can_name_are_stored_as_numbers(self, source, tmp_path):
        tokenizer = ListTokenizer(list(range(511)), 60_000)
        assert encode(source, tmp_path / "more", tokenizer, image_size=40, storage="bytes")["stored_as"] == "numbers"
        tokenizer = ListTokenizer(list(range(510)), 60_000)
        index = encode(source, tmp_path / "fewer", tokenizer, image_size=40, storage="bytes")
        assert (index["stored_as"], index["num_codes_in_use"]) == ("bytes", 510)
        images = from_uint8(np.asarray(ViewConfig().apply(source.load(10), 40)[0])[None])
        assert torch.equal(EncodedDataset(tmp_path / "fewer").views(10)[:1], tokenizer.encode(images))

    def test_another_storage_is_another_job(self, source, tmp_path):
        encode(source, tmp_path / "out")
        with pytest.raises(UserError, match="storage auto, now it is bytes"):
            encode(source, tmp_path / "out", storage="bytes")

    def test_what_an_earlier_version_began_goes_on(self, source, tmp_path):
        out, tokenizer = tmp_path / "out", ListTokenizer(self.entries(5), 40_001)
        encode(source, tmp_path / "new", tokenizer)

        class Stops(ListTokenizer):
            calls = 0

            def encode(self, images):
                self.calls += 1
                if self.calls > 3:
                    raise KeyboardInterrupt
                return super().encode(images)

        with pytest.raises(KeyboardInterrupt):
            encode(source, out, Stops(self.entries(5), 40_001))
        for name, key in (("job.json", "storage"), ("shard-00000.json", "used")):
            content = json.loads((out / name).read_text())
            del content[key]
            (out / name).write_text(json.dumps(content))
        index = encode(source, out, tokenizer)
        assert index.get("stored_as", "numbers") == "numbers"
        assert torch.equal(EncodedDataset(out).views(9), EncodedDataset(tmp_path / "new").views(9))


class TestReport:
    def test_bytes_of_codes_and_of_files(self, source, tmp_path):
        index = encode(source, tmp_path / "out", crops="ten")
        assert index["bytes_per_image"] == 10 * 4
        total = sum((tmp_path / "set" / "ab"[i // 6] / f"{i:02d}.png").stat().st_size for i in range(NUM))
        assert index["source_bytes_per_image"] == total / NUM
        assert index["source_formats"] == {"PNG": NUM}
        assert EncodedDataset(tmp_path / "out").num_bytes() == NUM * 40

    def test_rows_of_parquet_files_count_as_the_images_in_them(self, source, tmp_path):
        files = [(tmp_path / "set" / "ab"[i // 6] / f"{i:02d}.png").read_bytes() for i in range(NUM)]
        rows = pyarrow.table({"image": [{"bytes": data, "path": None} for data in files], "label": [0] * NUM})
        pyarrow.parquet.write_table(rows, tmp_path / "set.parquet")
        assert open_source(f"parquet:{tmp_path / 'set.parquet'}").encoded_bytes() == sum(map(len, files))

    def test_nothing_is_said_of_sources_that_are_no_image_files(self, tmp_path):
        np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.uint8))
        assert encode(open_source(f"npz:{tmp_path / 'images.npz'}"), tmp_path / "out")["source_bytes_per_image"] is None


def test_memory_does_not_grow_with_the_shard(tmp_path):
    class Wide(MeanTokenizer):
        """4 x 64 x 64 latents, made by numpy, whose memory is counted."""

        def encode(self, images):
            return torch.from_numpy(np.full((len(images), 4, 64, 64), float(images.mean()), dtype=np.float32))

    def peak(num):
        images = np.random.default_rng(0).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{num}.npz", arr_0=images)
        tracemalloc.start()
        try:
            encode(open_source(f"npz:{tmp_path / f'{num}.npz'}"), tmp_path / str(num), Wide(None), shard_size=1000, flip=False)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(20), peak(200)
    assert many - few < 4 * 4 * 64 * 64  # one image; 180 more were encoded
    assert few < 20 * 4 * 4 * 64 * 64


class TestInterruption:
    @pytest.fixture
    def whole(self, source, tmp_path):
        encode(source, tmp_path / "whole")
        return contents(tmp_path / "whole")

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_second_run_goes_on_after_the_finished_shards(self, source, tmp_path, whole, num_workers):
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            encode(source, out, MeanTokenizer(fail_at=3), num_workers=num_workers)
        assert sorted(path.name for path in out.iterdir()) == ["codes-00000.npy", "job.json", "labels-00000.npy", "shard-00000.json"]
        with pytest.raises(UserError, match="not finished; run the same genvision encode command again"):
            EncodedDataset(out)
        tokenizer = MeanTokenizer()
        encode(source, out, tokenizer, num_workers=num_workers)
        assert sum(tokenizer.batch_sizes) == 2 * (NUM - SHARD)
        assert contents(out) == whole

    def test_a_finished_set_is_not_made_again(self, source, tmp_path, whole):
        assert encode(source, tmp_path / "whole", MeanTokenizer(fail_at=0))["num_images"] == NUM
        assert contents(tmp_path / "whole") == whole

    @pytest.mark.parametrize("kill_at", range(0, 24, 3))
    def test_killed_in_the_middle_of_any_write(self, source, tmp_path, whole, kill_at):
        out = tmp_path / "out"
        process = multiprocessing.get_context("fork").Process(target=_encode_until_killed, args=(source, out, kill_at))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        if not (out / "index.json").exists():
            with pytest.raises(UserError, match=r"not finished|no encoded data"):
                EncodedDataset(out)
        encode(source, out)
        EncodedDataset(out)
        assert {name: data for name, data in contents(out).items() if not name.startswith("shard-")} == whole

    def test_another_job_is_refused_with_the_difference(self, source, tmp_path, whole):
        for options, word in (
            ({"tokenizer_hash": "b" * 64}, "tokenizer_hash aaaaaaaaaaaa, now it is bbbbbbbbbbbb"),
            ({"flip": False}, "flip True, now it is False"),
            ({"image_size": 4}, "image_size 8"),
            ({"crops": "ten"}, "crops center"),
        ):
            with pytest.raises(UserError, match=word):
                encode(source, tmp_path / "whole", **options)
        Image.new("RGB", (9, 9)).save(tmp_path / "set" / "a" / "new.png")
        with pytest.raises(UserError, match="num_source_images 11, now it is 12"):
            encode(open_source(source.spec), tmp_path / "whole")
        assert contents(tmp_path / "whole") == whole

    def test_a_folder_of_other_things_is_refused(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="is not empty"):
            encode(source, tmp_path / "out")


@pytest.mark.parametrize("kill_at", [20, 22, 23, 25, 27, 31, 32, 33])
def test_killed_while_codes_are_stored_again(source, tmp_path, kill_at):
    """After the last shard (20 syncs), and until the old shards are removed (34)."""
    options = {"image_size": 24, "storage": "bytes"}
    entries = list(range(300, 0, -1))
    encode(source, tmp_path / "whole", ListTokenizer(entries, 1000), **options)
    out = tmp_path / "out"
    arguments = (source, out, kill_at, ListTokenizer(entries, 1000), options)
    process = multiprocessing.get_context("fork").Process(target=_encode_until_killed, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    encode(source, out, ListTokenizer(entries, 1000), **options)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_a_job_leaves_that_is_killed_after_its_index_is_removed_by_the_next(source, tmp_path):
    encode(source, tmp_path / "out", ListTokenizer([7, 900], 1000))
    whole = contents(tmp_path / "out")
    for name in ("codes-00000.npy", "codes-00001.npy", "shard-00002.json"):
        (tmp_path / "out" / name).write_bytes(b"left")
    encode(source, tmp_path / "out", ListTokenizer([7, 900], 1000))
    assert contents(tmp_path / "out") == whole


def test_bad_images_are_left_out_and_listed(source, tmp_path):
    for index in (1, 8, 9, 10):
        damage(source, index)
    with pytest.raises(BadImageError, match=r"01\.png"):
        encode(source, tmp_path / "out")
    index = encode(source, tmp_path / "out", on_bad_image="skip", num_workers=1)
    assert index["num_images"] == 7
    assert sorted(map(int, index["bad_images"])) == [1, 8, 9, 10]
    assert source.name(9) in index["bad_images"]["9"]
    assert [shard["codes"] for shard in index["shards"]] == ["codes-00000.npy", "codes-00001.npy"]
    data = EncodedDataset(tmp_path / "out")
    np.testing.assert_array_equal(data.labels, source.labels[[0, 2, 3, 4, 5, 6, 7]])
    expected = MeanTokenizer().encode(from_uint8(np.asarray(ViewConfig().apply(source.load(7), SIZE)[0])[None]))
    assert torch.equal(data.views(6)[:1], expected)


def test_a_shard_with_skipped_images_is_made_again_when_none_may_be_skipped(source, tmp_path):
    damage(source, 1)
    with pytest.raises(KeyboardInterrupt):
        encode(source, tmp_path / "out", MeanTokenizer(fail_at=3), on_bad_image="skip")
    with pytest.raises(BadImageError, match=r"01\.png"):
        encode(source, tmp_path / "out")


def test_a_set_without_one_readable_image_is_refused(source, tmp_path):
    for index in range(NUM):
        damage(source, index)
    with pytest.raises(UserError, match="not one of its 11 images"):
        encode(source, tmp_path / "out", on_bad_image="skip")


def test_processes_share_the_work(source, tmp_path):
    encode(source, tmp_path / "one")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    ranks = [context.Process(target=_encode_rank, args=(source, tmp_path / "two", rank, barrier)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def _encode_rank(source, out, rank, barrier):
    tokenizer = MeanTokenizer()
    index = encode(source, out, tokenizer, rank=rank, world_size=2, barrier=lambda: barrier.wait(20) and None)
    assert index["num_images"] == NUM
    assert sum(tokenizer.batch_sizes) == 2 * ((4 + 3) if rank == 0 else 4)


def _encode_until_killed(source, out, kill_at, tokenizer=None, options=None):
    """SIGKILL at the given sync of a file or folder: what was written has not got its name yet, or has just got it."""
    count = 0

    def fsync(handle):
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    array_files.os.fsync = fsync
    encode(source, out, tokenizer, **(options or {}))
