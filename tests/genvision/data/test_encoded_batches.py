"""What lies beside the codes of an encoded set: deviations of a posterior, features of a frozen network."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from encoding_examples import NUM, SIZE, LinearTokenizer, MeanTokenizer, contents, encode, open_images

from genvision.data.alignment import FrozenFeatures
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset, StoredFeatures
from genvision.data.order import uniform_choice
from genvision.data.transforms import ViewConfig
from genvision.errors import UserError
from genvision.images import from_uint8
from genvision.streams import IndexedStreams, Purpose
from genvision.tokenizers.kl import KLTokenizer


@pytest.fixture
def source(tmp_path):
    return open_images(tmp_path / "set")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    options = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
    return KLTokenizer(image_size=SIZE, latent_mean=(0.5, -1.0), latent_std=(2.0, 0.25), **options).eval()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """2 x 2 tokens of 64 features."""
    timm = pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("network") / "weights.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return FrozenFeatures("test_vit", path, tokens_per_side=2)


def pictures(source, index):
    """Both views of an image."""
    return from_uint8(np.stack([np.asarray(view) for view in ViewConfig(flip=True).apply(source.load(index), SIZE)]))


class Stops:
    """A tokenizer that is interrupted at its fourth batch."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0
        self.spec, self.device = tokenizer.spec, tokenizer.device

    def posterior(self, images):
        self.calls += 1
        if self.calls > 3:
            raise KeyboardInterrupt
        return self.tokenizer.posterior(images)


class TestPosterior:
    @pytest.fixture
    def data(self, source, tmp_path, tokenizer):
        encode(source, tmp_path / "out", tokenizer, posterior=True)
        return EncodedDataset(tmp_path / "out", seed=3)

    def test_mean_and_deviation_of_every_view_are_stored(self, data, source, tokenizer):
        assert (data.kind, data.has_posterior, data.index["posterior"]) == ("latents", True, True)
        for index in range(NUM):
            with torch.no_grad():
                mean, std = tokenizer.posterior(pictures(source, index))
            torch.testing.assert_close(data.views(index), mean, atol=1e-5, rtol=0)
            stored = np.load(data.path / f"deviations-0000{index // 4}.npy")[index % 4]
            torch.testing.assert_close(torch.from_numpy(stored), std, atol=1e-5, rtol=0)
        names = [f"{part}-0000{shard}.npy" for part in ("codes", "deviations", "labels") for shard in range(3)]
        assert sorted(path.name for path in data.path.iterdir()) == sorted(["index.json", "job.json", *names])
        assert data.index["bytes_per_image"] == 2 * 2 * 32 * 4 and data.num_bytes() == NUM * 512

    def test_a_sample_is_mean_plus_deviation_times_the_noise_of_its_position(self, data):
        positions, indices = np.arange(40, 60), np.arange(20) % NUM
        noise = IndexedStreams(3, positions).normal(Purpose.POSTERIOR, (2, 4, 4))
        drawn = data.get_batch(positions, indices)["codes"]
        assert drawn.dtype == torch.float32
        views = uniform_choice(3, positions, 2).tolist()
        assert set(views) == {0, 1}
        for row, (index, view) in enumerate(zip(indices.tolist(), views, strict=True)):
            std = torch.from_numpy(np.load(data.path / f"deviations-0000{index // 4}.npy")[index % 4, view])
            assert torch.equal(drawn[row], data.views(index)[view] + std * noise[row])

    def test_samples_have_the_mean_and_spread_of_the_posterior(self, source, tmp_path, tokenizer):
        encode(source, tmp_path / "out", tokenizer, posterior=True, flip=False)
        data = EncodedDataset(tmp_path / "out", seed=5)
        samples = data.get_batch(np.arange(4000), np.full(4000, 6))["codes"]
        std = torch.from_numpy(np.load(data.path / "deviations-00001.npy")[2, 0])
        assert std.max() > 1.5 * std.min()
        units = (samples - data.views(6)) / std
        assert units.mean(0).abs().max() < 4.5 / 4000**0.5  # standard errors, of 32 numbers
        assert (units.std(0) - 1).abs().max() < 4.5 / 8000**0.5
        correlations = torch.corrcoef(units.flatten(1).T) - torch.eye(32)
        assert correlations.abs().max() < 5 / 4000**0.5

    def test_samples_depend_on_seed_and_position_alone(self, data):
        positions, indices = np.arange(22), np.arange(22) % NUM
        whole = data.get_batch(positions, indices)["codes"]
        parts = [data.get_batch(positions[part], indices[part])["codes"] for part in (slice(0, 5), slice(5, 6), slice(6, 22))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(data.get(9, indices[9].item())["codes"], whole[9])
        assert torch.equal(pickle.loads(pickle.dumps(data)).get_batch(positions, indices)["codes"], whole)
        assert not torch.equal(EncodedDataset(data.path, seed=4).get_batch(positions, indices)["codes"], whole)
        stream = list(batches(data, seed=1, batch_size=4, end_step=6))
        late = list(batches(data, seed=1, batch_size=4, start_step=4, end_step=6, num_workers=1))
        for one, other in zip(late, stream[4:], strict=True):
            assert torch.equal(one["codes"], other["codes"])

    def test_every_visit_of_an_image_has_another_sample(self, data):
        visits = data.get_batch(np.arange(6) * NUM + 2, np.full(6, 2))["codes"]
        assert all(not torch.equal(visits[a], visits[b]) for a in range(6) for b in range(a))

    def test_half_precision_is_for_deviations_too(self, source, tmp_path, tokenizer, data):
        index = encode(source, tmp_path / "half", tokenizer, posterior=True, dtype="float16")
        assert index["bytes_per_image"] == data.index["bytes_per_image"] / 2
        half = EncodedDataset(tmp_path / "half", seed=3)
        one, other = (set_.get_batch(np.arange(8), np.arange(8))["codes"] for set_ in (half, data))
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)

    def test_without_a_posterior_samples_are_the_latents(self, source, tmp_path):
        encode(source, tmp_path / "out", LinearTokenizer(), posterior=True, flip=False)
        data = EncodedDataset(tmp_path / "out")
        assert torch.equal(data.get(5, 7)["codes"], data.views(7)[0])

    def test_without_the_option_batches_hold_the_means(self, source, tmp_path, tokenizer):
        encode(source, tmp_path / "out", tokenizer, flip=False)
        data = EncodedDataset(tmp_path / "out")
        assert not data.has_posterior and torch.equal(data.get(5, 7)["codes"], data.views(7)[0])

    def test_discrete_codes_have_none(self, source, tmp_path):
        with pytest.raises(UserError, match="posterior is of continuous latents, but the tokenizer makes discrete codes") as caught:
            encode(source, tmp_path / "out", posterior=True)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    def test_a_deviation_that_is_no_number_is_refused_by_image(self, source, tmp_path, tokenizer):
        class Broken(Stops):
            def posterior(self, images):
                mean, std = self.tokenizer.posterior(images)
                return mean, std.index_fill(0, torch.tensor([2, 3]), torch.inf)

        with pytest.raises(UserError, match=r"01\.png: its deviations are NaN, infinite or too large for float32; the tokenizer is broken"):
            encode(source, tmp_path / "out", Broken(tokenizer), posterior=True)


class TestFeatures:
    @pytest.fixture
    def data(self, source, tmp_path, network):
        encode(source, tmp_path / "out", MeanTokenizer(None), features=network)
        return EncodedDataset(tmp_path / "out", seed=3)

    def test_those_of_every_view_are_the_networks(self, data, source, network):
        for index in range(NUM):
            stored = np.load(data.path / f"features-0000{index // 4}.npy")
            assert (stored.dtype, stored.shape[1:]) == (np.float16, (2, 4, 64))
            expected = network(pictures(source, index))
            torch.testing.assert_close(torch.from_numpy(stored[index % 4]).float(), expected, atol=4e-3, rtol=1e-3)
        assert data.num_bytes() == NUM * 2 * (2 * 4 * 4 + 4 * 64 * 2)

    def test_batches_hold_those_of_the_view_whose_codes_they_hold(self, data):
        batch = data.get_batch(np.arange(30), np.arange(30) % NUM)
        assert batch["features"].shape == (30, 4, 64) and batch["features"].dtype == torch.float32
        seen = set()
        for row in range(30):
            index = row % NUM
            view = int((data.views(index) == batch["codes"][row]).flatten(1).all(1).nonzero()[0])
            stored = np.load(data.path / f"features-0000{index // 4}.npy")[index % 4, view]
            assert torch.equal(batch["features"][row], torch.from_numpy(stored).float())
            seen.add(view)
        assert seen == {0, 1}
        assert torch.equal(pickle.loads(pickle.dumps(data)).get(7, 7)["features"], batch["features"][7])

    def test_they_can_be_left_out_of_batches(self, data):
        assert set(EncodedDataset(data.path, with_features=False).get(0, 0)) == {"codes", "labels", "positions"}

    def test_the_index_names_the_network_and_its_grid(self, data, network):
        expected = {"network": "test_vit.r160_in1k", "hash": network.hash, "tokens_per_side": 2, "dim": 64}
        assert data.index["features"] == expected and data.features == StoredFeatures(**expected)
        assert data.features.shape == (4, 64)

    def test_they_lie_beside_codes_that_are_stored_small_and_beside_deviations(self, source, tmp_path, network, tokenizer):
        index = encode(source, tmp_path / "codes", MeanTokenizer(1000), features=network)
        assert index["stored_as"] == "ranks"
        assert {path.name[:-10] for path in (tmp_path / "codes").glob("*.npy")} == {"ranks", "features", "labels"}
        assert EncodedDataset(tmp_path / "codes").get(0, 0)["features"].shape == (4, 64)
        encode(source, tmp_path / "both", tokenizer, posterior=True, features=network)
        batch = EncodedDataset(tmp_path / "both").get_batch(np.arange(3), np.arange(3))
        assert batch["codes"].shape == (3, 2, 4, 4) and batch["features"].shape == (3, 4, 64)

    def test_those_that_half_precision_cannot_hold_are_refused_by_image(self, source, tmp_path, network):
        loud = copy.deepcopy(network)
        loud.network.norm.weight.fill_(1e6)
        with pytest.raises(UserError, match=r"00\.png: its features are NaN, infinite or too large for float16; take other weights"):
            encode(source, tmp_path / "out", MeanTokenizer(None), features=loud)


def test_what_lies_beside_codes_is_for_one_view_of_each_image(source, tmp_path, tokenizer, network):
    for options, what in (({"posterior": True}, "samples of a posterior"), ({"features": network}, "features")):
        encode(source, tmp_path / what, tokenizer, **options)
        with pytest.raises(UserError, match=rf"data\.views 2: .* has {what}, which are for one view of each image; set it to 1") as caught:
            EncodedDataset(tmp_path / what, views=2)
        assert "\n" not in str(caught.value)
    without = EncodedDataset(tmp_path / "features", views=2, with_features=False)
    assert without.get(0, 0)["codes"].shape == (2, 2, 4, 4)


class TestInterruption:
    def test_a_second_run_goes_on_after_the_finished_shards(self, source, tmp_path, tokenizer, network):
        options = {"posterior": True, "features": network}
        encode(source, tmp_path / "whole", tokenizer, **options)
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            encode(source, out, Stops(tokenizer), **options)
        parts = ["codes", "deviations", "features", "labels"]
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["job.json", "shard-00000.json", *(f"{part}-00000.npy" for part in parts)]
        )
        counted = Stops(tokenizer)
        counted.calls = -100
        encode(source, out, counted, **options)
        assert counted.calls == -100 + 4  # the batches of two shards
        assert contents(out) == contents(tmp_path / "whole")

    def test_other_options_are_another_job(self, source, tmp_path, tokenizer, network):
        encode(source, tmp_path / "out", tokenizer, features=network)
        whole = contents(tmp_path / "out")
        for options, message in (
            ({"features": network, "posterior": True}, "begun with posterior False, now it is True"),
            ({}, rf"begun with features network test_vit\.r160_in1k, hash {network.hash[:12]}, tokens_per_side 2, dim 64, now it is None"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                encode(source, tmp_path / "out", tokenizer, **options)
            assert "\n" not in str(caught.value)
        assert contents(tmp_path / "out") == whole

    def test_a_job_of_an_earlier_version_goes_on_and_does_not_become_another(self, source, tmp_path, tokenizer):
        encode(source, tmp_path / "whole", tokenizer)
        out = tmp_path / "out"

        class EncodeStops(Stops):
            def encode(self, images):
                return self.posterior(images)[0]

        with pytest.raises(KeyboardInterrupt):
            encode(source, out, EncodeStops(tokenizer))
        job = json.loads((out / "job.json").read_text())
        (out / "job.json").write_text(json.dumps({key: value for key, value in job.items() if key not in ("posterior", "features")}))
        with pytest.raises(UserError, match="begun with posterior False, now it is True"):
            encode(source, out, tokenizer, posterior=True)
        encode(source, out, tokenizer)
        assert torch.equal(EncodedDataset(out).views(9), EncodedDataset(tmp_path / "whole").views(9))

    def test_a_set_of_an_earlier_version_is_read_and_keeps_its_fingerprint(self, source, tmp_path, tokenizer):
        encode(source, tmp_path / "out", tokenizer)
        data = EncodedDataset(tmp_path / "out")
        content = {key: value for key, value in data.index.items() if key not in ("posterior", "features")}
        (data.path / "index.json").write_text(json.dumps(content))
        older = EncodedDataset(data.path)
        assert older.index == content and not older.has_posterior and older.features is None
        assert torch.equal(older.get(3, 5)["codes"], data.get(3, 5)["codes"])
        encode(source, data.path, tokenizer)  # finished: nothing is made anew
        assert EncodedDataset(data.path).fingerprint() == older.fingerprint()

    def test_unreadable_images_are_left_out_of_every_part(self, source, tmp_path, tokenizer, network):
        for index in (1, 8, 9, 10):
            with open(source.name(index), "r+b") as file:  # noqa: PTH123
                file.truncate(70)
        index = encode(source, tmp_path / "out", tokenizer, posterior=True, features=network, on_bad_image="skip")
        assert [shard["count"] for shard in index["shards"]] == [3, 4]
        data = EncodedDataset(tmp_path / "out")
        assert len(data) == 7  # image 7 is the last of them
        view = uniform_choice(0, np.array([0]), 2)[0]
        torch.testing.assert_close(data.get(0, 6)["features"], network(pictures(source, 7))[view], atol=4e-3, rtol=1e-3)

    def test_fingerprints_differ_by_what_is_stored(self, source, tmp_path, tokenizer, network):
        for name, options in {"plain": {}, "posterior": {"posterior": True}, "features": {"features": network}}.items():
            encode(source, tmp_path / name, tokenizer, **options)
        assert len({EncodedDataset(tmp_path / name).fingerprint() for name in ("plain", "posterior", "features")}) == 3


@pytest.mark.parametrize(("part", "shape"), [("deviations", r"\[4, 2, 2, 4, 4\]"), ("features", r"\[4, 2, 4, 64\]")])
def test_damaged_or_missing_files_are_refused_by_name(source, tmp_path, tokenizer, network, part, shape):
    encode(source, tmp_path / "out", tokenizer, posterior=True, features=network)
    file = tmp_path / "out" / f"{part}-00001.npy"
    whole = file.read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=rf"{part}-00001\.npy: {message}") as caught:
            EncodedDataset(tmp_path / "out")
        assert "\n" not in str(caught.value)

    for content in (whole[:-1], whole[:60], whole[:10] + b"(" * 200):
        file.write_bytes(content)
        refused("is damaged")
    file.unlink()
    refused("is missing")
    np.save(file, np.zeros((4, 2, 3), dtype=np.float16))
    refused(rf"is float16 \[4, 2, 3\], index\.json says .* {shape}")


def test_an_index_that_tells_features_otherwise_is_refused(source, tmp_path):
    encode(source, tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    for features in ("dinov2", {"network": "dinov2"}):
        index.write_text(json.dumps({**json.loads(index.read_text()), "features": features}))
        with pytest.raises(UserError, match=r"index\.json: is not the index of encoded data"):
            EncodedDataset(tmp_path / "out")
