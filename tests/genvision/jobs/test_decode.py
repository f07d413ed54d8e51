"""Decoding jobs: the pictures of an encoded set, under its own numbers."""

import json

import numpy as np
import pytest
import torch
from encoding_examples import LinearTokenizer, encode, open_images
from PIL import Image

from genvision.data.encoded import EncodedDataset
from genvision.errors import UserError
from genvision.images import to_uint8
from genvision.jobs.decode import classes_in_turn, decode_encoded
from genvision.jobs.encode import _warn, encode_data, format_encoded
from genvision.tokenizers import base
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.vq import VQTokenizer


@pytest.fixture
def tokenizer(tmp_path):
    """Folder of a VQ tokenizer for 8 x 8 images, 4 x 4 tokens of 16 codes."""
    options = {"codebook_dim": 4, "base_channels": 4, "encoder_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 2}
    VQTokenizer(image_size=8, codebook_size=16, **options).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def codes(tokenizer, tmp_path):
    """Eleven pictures in two views, as codes."""
    open_images(tmp_path / "set")
    encode_data(tokenizer, f"folder:{tmp_path / 'set'}", tmp_path / "codes", flip=True)
    return tmp_path / "codes"


def expected(tokenizer, codes, view=0, places=None, rounding="trunc127.5"):
    data = EncodedDataset(codes)
    with torch.inference_mode():
        pictures = [load_tokenizer(tokenizer).decode(data.views(i)[view : view + 1]) for i in (range(11) if places is None else places)]
    return to_uint8(torch.cat(pictures), rounding)


def close(images, others):
    """Up to the last level: a batch of another size is another order of sums."""
    return np.abs(np.asarray(images, dtype=int) - others).max() <= 1


def test_a_folder_of_pictures_named_by_place(tokenizer, codes, tmp_path):
    places = decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer, batch_size=4)
    assert places.tolist() == list(range(11))
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"{i:06d}.png")) for i in range(11)]
    assert close(pictures, expected(tokenizer, codes))
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels["label_names"] == ["a", "b"]
    assert list(labels["labels"].values()) == [0] * 6 + [1] * 5


def test_some_of_each_class_of_one_view(tokenizer, codes, tmp_path):
    places = decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer, num=5, view=1, rounding="round")
    assert places.tolist() == [0, 1, 2, 6, 7]
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in places]
    assert close([np.asarray(Image.open(file)) for file in files], expected(tokenizer, codes, 1, places, "round"))
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())["labels"]
    assert labels == {"000000.png": 0, "000001.png": 0, "000002.png": 0, "000006.png": 1, "000007.png": 1}


def test_an_npz(tokenizer, codes, tmp_path):
    decode_encoded(codes, tmp_path / "out.npz", tokenizer=tokenizer, batch_size=3)
    with np.load(tmp_path / "out.npz") as file:
        assert close(file["arr_0"], expected(tokenizer, codes))
        assert file["arr_1"].tolist() == [0] * 6 + [1] * 5


def test_a_grid_has_a_row_a_class(tokenizer, codes, tmp_path):
    places = decode_encoded(codes, tmp_path / "out.png", tokenizer=tokenizer)
    assert places.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.height == 2 + 2 * 66  # two rows of pictures, enlarged to 64
    assert sheet.width > 2 + 5 * 66  # and their names


def test_a_second_run_does_no_work_again(tokenizer, codes, tmp_path):
    decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    (tmp_path / "out" / "000005.png").unlink()
    decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer, batch_size=2)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert {name for name in before if after[name] != before[name]} == {"000004.png", "000005.png"}
    with pytest.raises(UserError, match="another job's results"):
        decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer, view=1)


def test_latents_are_decoded_too(tmp_path, monkeypatch):
    monkeypatch.setitem(base.TOKENIZERS, "LinearTokenizer", "encoding_examples")
    linear = LinearTokenizer()
    linear.save_pretrained(tmp_path / "tokenizer")
    encode(open_images(tmp_path / "set"), tmp_path / "latents", linear, tokenizer_hash=content_hash(linear))
    decode_encoded(tmp_path / "latents", tmp_path / "out.npz", tokenizer=tmp_path / "tokenizer")
    with np.load(tmp_path / "out.npz") as file:
        assert close(file["arr_0"], expected(tmp_path / "tokenizer", tmp_path / "latents"))


class TestRefusals:
    def test_another_tokenizer(self, tokenizer, codes, tmp_path):
        other = load_tokenizer(tokenizer)
        with torch.no_grad():
            other.decoder.conv_out.bias += 1
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match="were made by tokenizer"):
            decode_encoded(codes, tmp_path / "out", tokenizer=tmp_path / "other")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"view": 2}, r"view 2: .* holds 2 of every image; choose 0 \.\. 1"),
            ({"num": 12}, r"num 12: .* holds 11 images"),
            ({"num": 0}, r"choose 1 \.\. 11"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_options_that_the_set_cannot_meet(self, tokenizer, codes, tmp_path, options, said):
        with pytest.raises(UserError, match=said) as caught:
            decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_codes_outside_the_codebook(self, tokenizer, codes, tmp_path):
        stored = np.load(codes / "codes-00000.npy")
        stored[4, 0, 0, 0] = 16
        np.save(codes / "codes-00000.npy", stored)
        with pytest.raises(UserError, match=r"codes-00000\.npy: holds 16, but its codebook has codes 0 \.\. 15"):
            decode_encoded(codes, tmp_path / "out", tokenizer=tokenizer)


def test_classes_come_in_turn():
    labels = np.array([3, 1, 1, 1, 3, 0, 1])
    assert classes_in_turn(labels, 7).tolist() == list(range(7))
    assert classes_in_turn(labels, 3).tolist() == [0, 1, 5]
    assert classes_in_turn(labels, 5).tolist() == [0, 1, 2, 4, 5]
    assert classes_in_turn(np.arange(100) // 2, 5).tolist() == [0, 20, 40, 60, 80]


def test_the_report_compares_codes_with_files(tokenizer, codes, tmp_path):
    index = EncodedDataset(codes).index
    size = round(sum(path.stat().st_size for path in (tmp_path / "set").rglob("*.png")) / 11)
    first, second = format_encoded(index).splitlines()
    assert first == f"11 images in 2 views, codes of shape [4, 4]: 32 bytes an image in 2 views, the PNGs take {size}"
    assert second == f"{index['num_codes_in_use']} of 16 codes in use, stored as plain numbers"


def test_a_stream_that_cannot_hold_the_codes_is_said(capsys):
    _warn({"bad_images": {}, "storage": "bytes", "num_codes_in_use": 511})
    assert "storage bytes holds 510 codes, but 511 are in use" in capsys.readouterr().err
    _warn({"bad_images": {}, "storage": "bytes", "num_codes_in_use": 510})
    assert capsys.readouterr().err == ""
