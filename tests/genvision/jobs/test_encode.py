"""Encoding jobs: what stands beside the codes, as the command line makes it, and its errors."""

import sys

import numpy as np
import pytest
import torch
from encoding_examples import open_images

from genvision.cli import main
from genvision.data.alignment import FrozenFeatures
from genvision.data.encoded import EncodedDataset
from genvision.jobs.encode import encode_data, format_encoded
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.titok import TiTok


@pytest.fixture
def photos(tmp_path):
    open_images(tmp_path / "set")
    return f"folder:{tmp_path / 'set'}"


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    options = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
    KLTokenizer(image_size=8, **options).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def weights(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def encode(*words):
    main(["encode", "--workers", "0", *map(str, words)])


@pytest.fixture
def refused(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as exit_:
            encode(*words)
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_deviations_and_features_from_the_command_line(tokenizer, photos, weights, tmp_path, capsys):
    options = ("--posterior", "--features", "test_vit", "--features-weights", weights, "--features-grid", "4", "--dtype", "float16")
    command = ("--tokenizer", tokenizer, "--data", photos, "--out", tmp_path / "out", *options)
    encode(*command)
    said = capsys.readouterr().out
    assert "11 images in 1 view, latents of shape [2, 4, 4] with deviations, 4 x 4 features of test_vit.r160_in1k: " in said
    assert f"{2 * 32 * 2 + 16 * 64 * 2:,} bytes an image in 1 view" in said
    data = EncodedDataset(tmp_path / "out")
    assert data.features.hash == FrozenFeatures("test_vit", weights).hash
    batch = data.get_batch(np.arange(3), np.arange(3))
    assert batch["features"].shape == (3, 16, 64)
    assert not torch.equal(batch["codes"], data.codes(np.arange(3), np.zeros(3, dtype=int)))
    encode(*command)  # a finished set is told again
    assert capsys.readouterr().out == said


def test_the_report_says_nothing_of_what_is_not_stored(tokenizer, photos, tmp_path):
    index = encode_data(tokenizer, photos, tmp_path / "out")
    assert format_encoded(index).startswith("11 images in 1 view, latents of shape [2, 4, 4]: 128 bytes an image in 1 view")


class TestRefusals:
    def test_a_posterior_of_discrete_codes(self, photos, tmp_path, refused):
        sides = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 16), ("depth", 1), ("heads", 2))}
        TiTok(image_size=8, patch_size=2, num_latent_tokens=5, token_dim=4, **sides).save_pretrained(tmp_path / "discrete")
        message = refused("--tokenizer", tmp_path / "discrete", "--data", photos, "--out", tmp_path / "out", "--posterior")
        assert f"{tmp_path / 'discrete'}: makes discrete codes, which have no posterior; leave --posterior out" in message

    def test_features_without_timm(self, tokenizer, photos, tmp_path, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        message = refused("--tokenizer", tokenizer, "--data", photos, "--out", tmp_path / "out", "--features", "dinov2_vitb14")
        assert message.endswith("features of a frozen network need timm: pip install genvision[timm]")

    def test_features_that_cannot_be_had(self, tokenizer, photos, weights, tmp_path, refused):
        command = ("--tokenizer", tokenizer, "--data", photos, "--out", tmp_path / "out")
        for options, expected in (
            (("--features", "test_vit"), "the feature network 'test_vit' has no weights; give a file of them (features_weights)"),
            (("--features", "test_vit2", "--features-weights", weights), "weights.pth: not the 118 tensors of timm's test_vit2"),
            (("--features", "test_vitt", "--features-weights", weights), "timm has no model 'test_vitt'"),
            (("--features", "test_vit", "--features-weights", weights, "--features-grid", "0"), "at least 1 a side, got 0"),
            (("--features-weights", weights), "features_weights and download are for the network of --features; name one"),
            (("--download",), "features_weights and download are for the network of --features; name one"),
        ):
            assert expected in refused(*command, *options), options
        assert not (tmp_path / "out").exists()

    def test_features_of_other_weights_into_the_same_folder(self, tokenizer, photos, weights, tmp_path, refused, capsys):
        command = ("--tokenizer", tokenizer, "--data", photos, "--out", tmp_path / "out", "--features", "test_vit", "--features-grid", "2")
        encode(*command, "--features-weights", weights)
        tensors = torch.load(weights, weights_only=True)
        torch.save(tensors | {"norm.bias": torch.ones(64)}, tmp_path / "other.pth")
        capsys.readouterr()
        message = refused(*command, "--features-weights", tmp_path / "other.pth")
        first, second = (FrozenFeatures("test_vit", path).hash[:12] for path in (weights, tmp_path / "other.pth"))
        assert f"was begun with features network test_vit.r160_in1k, hash {first}" in message and f"hash {second}" in message
