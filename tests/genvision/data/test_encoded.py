"""Encoded data sets: what is written, and that no interruption can spoil it."""

import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.data import encoded
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset, encode_dataset
from genvision.data.sources import BadImageError, open_source
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.images import from_uint8

NUM, SIZE, SHARD = 11, 8, 4


class Spec:
    def __init__(self, codebook_size):
        self.codebook_size = codebook_size


class MeanTokenizer:
    """Mean grey of patches of 4 x 4, in `codebook_size` levels; fails at batch number `fail_at`."""

    device = torch.device("cpu")

    def __init__(self, codebook_size=64, fail_at=None, flat=False):
        self.spec = Spec(codebook_size)
        self.fail_at, self.flat = fail_at, flat
        self.batch_sizes = []

    def encode(self, images):
        if len(self.batch_sizes) == self.fail_at:
            raise KeyboardInterrupt
        self.batch_sizes.append(len(images))
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
        codes = ((means + 1) / 2 * (self.spec.codebook_size - 1)).round().long()
        return codes.flatten(1) if self.flat else codes


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(NUM):
        path = tmp_path / "set" / "ab"[i // 6] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 12, 3), dtype=np.uint8)).save(path)
    return open_source(f"folder:{tmp_path / 'set'}")


def encode(source, out, tokenizer=None, **options):
    options = {"image_size": SIZE, "tokenizer_hash": "a" * 64, "shard_size": SHARD, "batch_size": 4, **options}
    return encode_dataset(tokenizer or MeanTokenizer(), source, out, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    encode(source, tmp_path / "out", MeanTokenizer(codebook_size))
    assert np.load(tmp_path / "out" / "codes-00000.npy").dtype == dtype
    codes = torch.cat([EncodedDataset(tmp_path / "out").views(i) for i in range(NUM)])
    expected = MeanTokenizer(codebook_size).encode(from_uint8(np.asarray(ViewConfig().apply(source.load(0), SIZE)[0])[None]))
    assert torch.equal(codes[:1], expected)


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


def test_a_continuous_tokenizer_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="continuous"):
        encode(source, tmp_path / "out", MeanTokenizer(codebook_size=None))


class TestReading:
    @pytest.fixture
    def data(self, source, tmp_path):
        encode(source, tmp_path / "out", crops="ten")
        return EncodedDataset(tmp_path / "out", seed=3)

    def test_batches_hold_one_view_of_each_image(self, data):
        stream = batches(data, seed=1, batch_size=6, end_step=30)
        seen = [set() for _ in range(NUM)]
        for batch in stream:
            assert batch["codes"].dtype == batch["labels"].dtype == torch.int64
            assert batch["codes"].shape == (6, 2, 2)
        positions = np.arange(400)
        indices = positions % NUM
        batch = data.get_batch(positions, indices)
        for row, index in enumerate(indices.tolist()):
            matches = (data.views(index) == batch["codes"][row]).flatten(1).all(1).nonzero()
            seen[index] |= set(matches.flatten().tolist())
            assert len(matches)
        assert all(len(views) == 10 for views in seen)
        assert torch.equal(batch["labels"], torch.from_numpy(data.labels[indices]))
        assert torch.equal(data.get(77, indices[77].item())["codes"], batch["codes"][77])

    def test_streams_do_not_depend_on_start_workers_or_processes(self, data):
        whole = list(batches(data, seed=1, batch_size=6, end_step=6))
        late = list(batches(data, seed=1, batch_size=6, start_step=4, end_step=6, num_workers=1))
        ranks = [list(batches(data, seed=1, batch_size=6, end_step=6, rank=rank, world_size=2)) for rank in range(2)]
        for key in whole[0]:
            for one, other in zip(late, whole[4:], strict=True):
                assert torch.equal(one[key], other[key])
            for first, second, both in zip(*ranks, whole, strict=True):
                assert torch.equal(torch.cat([first[key], second[key]]), both[key])

    def test_it_travels_to_other_processes(self, data):
        copy = pickle.loads(pickle.dumps(data))
        assert len(pickle.dumps(data)) < 10_000
        assert torch.equal(copy.get(5, 7)["codes"], data.get(5, 7)["codes"])

    def test_another_tokenizer_is_refused(self, data):
        assert len(EncodedDataset(data.path, expected_tokenizer_hash="a" * 64)) == NUM
        with pytest.raises(UserError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb.*genvision encode again"):
            EncodedDataset(data.path, expected_tokenizer_hash="b" * 64)

    def test_fingerprint_names_the_codes(self, data, source, tmp_path):
        assert EncodedDataset(data.path).fingerprint() == data.fingerprint()
        encode(source, tmp_path / "other", flip=False)
        assert EncodedDataset(tmp_path / "other").fingerprint() != data.fingerprint()

    @pytest.mark.parametrize("name", ["codes-00001.npy", "labels-00002.npy"])
    @pytest.mark.parametrize("keep", [0, 60, -1])
    def test_a_truncated_shard_is_refused_by_name(self, data, name, keep):
        file = data.path / name
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UserError, match=name) as caught:
            EncodedDataset(data.path)
        assert "\n" not in str(caught.value)

    def test_missing_or_foreign_files_are_refused_by_name(self, data, tmp_path):
        (data.path / "codes-00001.npy").rename(tmp_path / "kept.npy")
        with pytest.raises(UserError, match=r"codes-00001\.npy: is missing"):
            EncodedDataset(data.path)
        np.save(data.path / "codes-00001.npy", np.zeros((4, 10, 3, 3), dtype=np.uint8))
        with pytest.raises(UserError, match=r"codes-00001\.npy.*\[4, 10, 3, 3\].*\[4, 10, 2, 2\]"):
            EncodedDataset(data.path)
        index = data.path / "index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "format_version": 99}))
        with pytest.raises(UserError, match="format 99"):
            EncodedDataset(data.path)
        index.write_text("{")
        with pytest.raises(UserError, match=r"index\.json"):
            EncodedDataset(data.path)
        with pytest.raises(UserError, match="no encoded data here"):
            EncodedDataset(tmp_path / "nothing")


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


def _encode_until_killed(source, out, kill_at):
    """SIGKILL at the given sync of a file or folder: what was written has not got its name yet, or has just got it."""
    count = 0

    def fsync(handle):
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    encoded.os.fsync = fsync
    encode(source, out)
