"""Encoded data sets: what is read, and what is refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from encoding_examples import NUM, SIZE, LinearTokenizer, ListTokenizer, MeanTokenizer, encode, open_images

from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset
from genvision.data.order import SampleOrder
from genvision.data.transforms import center_crop
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.tokenizers.base import content_hash
from genvision.tokenizers.vq import VQTokenizer


@pytest.fixture
def source(tmp_path):
    return open_images(tmp_path / "set")


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

    def test_labels_come_from_all_shards_and_are_counted(self, data, source):
        np.testing.assert_array_equal(data.labels, source.labels)
        indices = np.array([10, 0, 7, 7, 3])
        assert data.labels_of(indices).tolist() == source.labels[indices].tolist()
        assert (data.class_counts.tolist(), data.highest_label) == ([6, 5], 1)
        stored = np.load(data.path / "labels-00001.npy")
        np.save(data.path / "labels-00001.npy", stored + 1)
        with pytest.raises(UserError, match="labels go from 0 to 2, its index names 2 classes"):
            EncodedDataset(data.path)

    def test_a_window_can_be_given(self, data):
        assert data.order == SampleOrder(NUM)
        windowed = EncodedDataset(data.path, shuffle_window=3)
        assert windowed.order == SampleOrder(NUM, window=3)
        read = [batch["labels"].tolist() for batch in batches(windowed, seed=1, batch_size=NUM, end_step=2)]
        assert read == windowed.labels[windowed.order.indices(1, np.arange(2 * NUM))].reshape(2, NUM).tolist()

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

    def test_a_set_of_an_earlier_version_is_read(self, data):
        codes, index = data.views(7), data.path / "index.json"
        added = ("stored_as", "storage", "num_codes_in_use", "bytes_per_image", "source_bytes_per_image", "source_formats")
        content = json.loads(index.read_text())
        index.write_text(json.dumps({key: value for key, value in content.items() if key not in added}))
        assert torch.equal(EncodedDataset(data.path).views(7), codes)

    def test_a_code_outside_the_codebook_is_named(self, data):
        stored = np.load(data.path / "codes-00001.npy")
        stored[2, 3, 1, 1] = 99
        np.save(data.path / "codes-00001.npy", stored)
        damaged = EncodedDataset(data.path)
        damaged.views(5)
        with pytest.raises(UserError, match=r"codes-00001\.npy: holds 99, but its codebook has codes 0 \.\. 63"):
            damaged.views(6)


class TestTwoViews:
    def test_two_different_ones_of_each_image_and_the_first_is_what_one_view_is(self, source, tmp_path):
        encode(source, tmp_path / "out", MeanTokenizer(4096), crops="ten", enlarge=2)
        one, two = (EncodedDataset(tmp_path / "out", seed=3, views=views) for views in (1, 2))
        positions, indices = np.arange(2000), np.full(2000, 7)
        stored = two.views(7)
        assert len(stored.flatten(1).unique(dim=0)) == 10  # so that codes tell which view they are
        batch, single = (data.get_batch(positions, indices) for data in (two, one))
        assert batch["codes"].shape == (2000, 2, 2, 2) and torch.equal(batch["codes"][:, 0], single["codes"])
        assert all(torch.equal(batch[key], single[key]) for key in ("labels", "positions"))
        views = (batch["codes"][:, :, None] == stored).flatten(3).all(3).int().argmax(2)
        counts = torch.zeros(10, 10).index_put_((views[:, 0], views[:, 1]), torch.ones(2000), accumulate=True)
        assert counts.diagonal().sum() == 0
        pairs = counts[~torch.eye(10, dtype=torch.bool)]
        assert ((pairs - 2000 / 90).square() / (2000 / 90)).sum() < 141  # chi-square with 89 degrees of freedom: 1 in 3000

    def test_they_belong_to_the_position(self, source, tmp_path):
        encode(source, tmp_path / "out", flip=True)
        data = EncodedDataset(tmp_path / "out", seed=3, views=2)
        whole = list(batches(data, seed=1, batch_size=6, end_step=6))
        late = list(batches(data, seed=1, batch_size=6, start_step=4, end_step=6, num_workers=1))
        ranks = [list(batches(data, seed=1, batch_size=6, end_step=6, rank=rank, world_size=2)) for rank in range(2)]
        for key in whole[0]:
            assert all(torch.equal(one[key], other[key]) for one, other in zip(late, whole[4:], strict=True))
            for first, second, both in zip(*ranks, whole, strict=True):
                assert torch.equal(torch.cat([first[key], second[key]]), both[key])
        codes = data.get(5, 7)["codes"]
        assert torch.equal(codes.flatten(1).sort(0).values, data.views(7).flatten(1).sort(0).values)  # both, in some order

    def test_a_set_with_one_view_has_no_two(self, source, tmp_path):
        encode(source, tmp_path / "out", flip=False)
        with pytest.raises(UserError, match=r"data\.views 2: .*/out holds one view .*; encode again with --flip or --crops ten") as caught:
            EncodedDataset(tmp_path / "out", views=2)
        assert "\n" not in str(caught.value)


class TestReadingSmallForms:
    def test_a_rank_beyond_the_list_is_named(self, source, tmp_path):
        encode(source, tmp_path / "out", ListTokenizer([7, 900], 1000))
        stored = np.load(tmp_path / "out" / "ranks-00000.npy")
        stored[0, 0, 0, 0] = 2
        np.save(tmp_path / "out" / "ranks-00000.npy", stored)
        with pytest.raises(UserError, match=r"ranks-00000\.npy: holds 2, but 2 codes are in use"):
            EncodedDataset(tmp_path / "out").views(0)

    def test_a_damaged_stream_is_named(self, source, tmp_path):
        out = tmp_path / "out"
        encode(source, out, ListTokenizer(list(range(300)), 1000), image_size=24, storage="bytes")
        stream = np.load(out / "bytes-00000.npy")
        np.save(out / "bytes-00000.npy", stream[:-1])
        with pytest.raises(UserError, match=r"bytes-00000\.npy: has \d+ bytes, starts-00000\.npy says \d+"):
            EncodedDataset(out)
        stream[:2] = 255
        np.save(out / "bytes-00000.npy", stream)
        with pytest.raises(UserError, match=r"bytes-00000\.npy: the byte stream is damaged"):
            EncodedDataset(out).views(0)
        stream[:2] = 255, 0  # one code where there were two
        np.save(out / "bytes-00000.npy", stream)
        with pytest.raises(UserError, match=r"bytes-00000\.npy"):
            EncodedDataset(out).views(0)

    def test_it_travels_to_other_processes(self, source, tmp_path):
        encode(source, tmp_path / "out", ListTokenizer(list(range(300)), 1000), image_size=24, storage="bytes")
        data = EncodedDataset(tmp_path / "out")
        copy = pickle.loads(pickle.dumps(data))
        assert torch.equal(copy.get(5, 7)["codes"], data.get(5, 7)["codes"])

    def test_an_unknown_form_is_refused(self, source, tmp_path):
        encode(source, tmp_path / "out")
        index = tmp_path / "out" / "index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "stored_as": "zstd"}))
        with pytest.raises(UserError, match="zstd"):
            EncodedDataset(tmp_path / "out")


def tiny_vq():
    options = {"base_channels": 4, "encoder_multipliers": (1, 1, 2), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 2}
    return VQTokenizer(image_size=SIZE, codebook_size=300, codebook_dim=4, **options)


@pytest.mark.parametrize("make", [tiny_vq, LinearTokenizer], ids=["discrete", "continuous"])
def test_decoding_is_the_same_through_a_saved_tokenizer_and_an_encoded_set(source, tmp_path, make):
    make().save_pretrained(tmp_path / "tokenizer")
    tokenizer = type(make()).from_pretrained(tmp_path / "tokenizer").eval()
    digest = content_hash(tokenizer)
    encode(source, tmp_path / "out", tokenizer, tokenizer_hash=digest, batch_size=SIZE, flip=False)
    again = type(make()).from_pretrained(tmp_path / "tokenizer").eval()
    data = EncodedDataset(tmp_path / "out", content_hash(again))
    first = range(4)  # the images of one shard, as they were encoded together
    crops = from_uint8(np.stack([np.asarray(center_crop(source.load(i), SIZE)) for i in first]))
    with torch.inference_mode():
        expected = tokenizer.decode(tokenizer.encode(crops))
        stored = data.codes(np.array(first), np.zeros(4, dtype=np.int64))
        assert torch.equal(again.decode(stored), expected)
    assert expected.std() > 0
