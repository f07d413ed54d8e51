"""Diffusion transformers in training: how a batch is split does not matter, and what cannot be trained is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_examples import Runs, assert_equal_weights, largest_difference, weights

from genvision.cli import main
from genvision.errors import UserError
from genvision.jobs.encode import encode_data
from genvision.pipeline import ImagePipeline
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.pixels import PixelTokenizer

SMALL = {"hidden_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
BASE = {
    "stage": "generator",
    "seed": 4,
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "num_workers": 0},
    # Adam makes full steps of gradients that are rounding alone; a large eps leaves them small
    "optim": {"lr": 0.02, "eps": 1.0e-5},
    "train": {"num_steps": 8, "batch_size": 8, "ema_decays": [0.9], "log_every": 4, "checkpoint_every": 100, "preview_every": 0},
    "sampler": {"num_steps": 2},
}
FLOW = BASE | {"model": {"name": "dit", **SMALL, "path": "linear", "prediction": "velocity", "class_dropout": 0.3}}
DIFFUSION = BASE | {"model": {"name": "dit", **SMALL, "path": "ddpm", "learn_sigma": True, "class_dropout": 0.3}}
GUIDED = FLOW | {"loss": {"guidance": {"scale": 1.5, "start_step": 3, "max_time": 0.9, "drop_rate": 0.2}}}
GUIDED_DIFFUSION = DIFFUSION | {"loss": GUIDED["loss"]}
SCALED = FLOW | {
    "model": FLOW["model"] | {"scale_conditioned": True},
    "loss": {"guidance": {"scale": 1.2, "scale_max": 2.0, "start_step": 0, "guided_rate": 0.5}},
}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of six pictures of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory) -> Path:
    """Folder of a KL tokenizer: 16 x 16 pixels to latents [3, 8, 8]."""
    folder = tmp_path_factory.mktemp("kl") / "tokenizer"
    torch.manual_seed(1)
    sizes = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "mid_block_add_attention": False}
    KLTokenizer(image_size=16, latent_channels=3, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(kl, photos, tmp_path_factory) -> Path:
    """The photos as latents of `kl` with their deviations."""
    folder = tmp_path_factory.mktemp("latents") / "photos"
    encode_data(kl, f"folder:{photos}", folder, posterior=True)
    return folder


def on(spec: Path | str, tokenizer: Path | str, **data: object) -> dict:
    """What is trained on, to be put over a configuration."""
    return {"tokenizer": str(tokenizer), "data": {"spec": str(spec), "num_workers": 0, **data}}


SPLITS = {"flow": FLOW, "diffusion": DIFFUSION, "guided": GUIDED, "guided diffusion": GUIDED_DIFFUSION, "scale-conditioned": SCALED}


@pytest.mark.parametrize("kind", SPLITS)
def test_accumulated_parts_train_the_model_of_the_whole_batch(train, kind):
    whole, parts = train("whole", SPLITS[kind]), train("parts", SPLITS[kind], "--train.accumulation", 4)
    assert_equal_weights(whole, parts)
    assert all(tensor.abs().max() > 1e-3 for tensor in weights(whole).values())  # those that begin at zero do not stay there


@pytest.mark.parametrize(
    ("kind", "change"),
    [("flow", ["--model.class_dropout", 1e-9]), *((kind, ["--loss.guidance.start_step", 99]) for kind in ("guided", "scale-conditioned"))],
)
def test_what_is_split_there_matters(train, kind, change):
    """Or the test above would say nothing of label dropout and guidance."""
    assert largest_difference(train("with", SPLITS[kind]), train("without", SPLITS[kind], *change)) > 0.01


@pytest.mark.parametrize("kind", ["flow", "guided", "guided automatically"])
def test_two_processes_train_the_same_model_as_one(train, in_two_processes, kind):
    automatic = {"auto_every": 4, "auto_rate": 0.5, "auto_num": 20, "auto_extractor": "digits"}
    config = SPLITS[kind.removesuffix(" automatically")]
    if kind.endswith("automatically"):
        config = config | {"loss": {"guidance": config["loss"]["guidance"] | automatic}}
    one = train("one", config)
    in_two_processes(*train.words("two", config, "--train.accumulation", 2))
    assert_equal_weights(one, train.folder / "two")
    assert (train.folder / "two/checkpoints/step_00000008/rng_1.pt").is_file()


@pytest.mark.parametrize("kind", ["flow", "diffusion", "guided"])
def test_gradient_checkpointing_changes_nothing(train, kind):
    plain, thrifty = train("plain", SPLITS[kind]), train("thrifty", SPLITS[kind], "--train.gradient_checkpointing", "block")
    assert_equal_weights(plain, thrifty, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "diffusion", "guided"])
def test_a_compiled_model_is_trained_to_the_same_weights(train, kind):
    plain, compiled = train("plain", SPLITS[kind]), train("compiled", SPLITS[kind], "--train.compile", "true")
    assert_equal_weights(plain, compiled, atol=1e-4)


class TestLatents:
    def test_images_are_trained_on_through_a_kl_tokenizer(self, train, kl, photos):
        through = FLOW | on(f"folder:{photos}", kl, image_size=16)
        sampled = train("sampled", through, "--data.posterior", "sample")
        # the sample of a latent belongs to the position, like everything else that is drawn
        parts = train("parts", through, "--data.posterior", "sample", "--train.accumulation", 4)
        assert_equal_weights(sampled, parts, atol=1e-4)
        assert largest_difference(train("means", through), sampled) > 1e-3
        pipeline = ImagePipeline.from_pretrained(sampled / "model")
        assert pipeline([0, 1], output_type="np").images.shape == (2, 16, 16, 3)
        assert pipeline.generator.code_shape == (3, 8, 8) and pipeline.label_names == ["a", "b"]

    def test_an_encoded_set_trains_like_the_images_themselves(self, train, kl, photos, latents):
        encoded = train("encoded", FLOW | on(f"encoded:{latents}", kl, posterior="sample"))
        images = train("images", FLOW | on(f"folder:{photos}", kl, image_size=16, posterior="sample", flip=False))
        assert_equal_weights(encoded, images, atol=1e-4)

    def test_the_set_decides_on_means_or_samples(self, train, kl, photos, latents, tmp_path):
        message = train.refused(FLOW | on(f"encoded:{latents}", kl))
        assert "data.posterior mean" in message and "set data.posterior to sample" in message
        encode_data(kl, f"folder:{photos}", tmp_path / "means")
        message = train.refused(FLOW | on(f"encoded:{tmp_path / 'means'}", kl, posterior="sample"))
        assert "data.posterior sample" in message and "encode again with --posterior" in message

    def test_samples_of_a_tokenizer_without_a_posterior(self, train, tiny_tokenizer):
        llamagen = {"name": "llamagen", "hidden_dim": 16, "depth": 1, "num_heads": 2, "mlp_multiple_of": 8}
        config = {key: value for key, value in FLOW.items() if key != "sampler"} | {"model": llamagen}
        message = train.refused(config | {"tokenizer": str(tiny_tokenizer)}, "--data.posterior", "sample")
        assert "data.posterior sample" in message and "no posterior" in message

    def test_latents_of_another_tokenizer(self, train, kl, latents, tmp_path):
        PixelTokenizer(image_size=16).save_pretrained(tmp_path / "pixels")
        for other in (tmp_path / "pixels", "pixels"):
            message = train.refused(FLOW | on(f"encoded:{latents}", other, posterior="sample"))
            assert str(latents) in message and "its codes were made by tokenizer" in message and "genvision encode again" in message

    def test_latents_that_are_no_numbers_are_skipped_and_counted(self, train, kl, latents, tmp_path):
        """12 images in batches of 4: one batch of each three has the broken one."""
        broken = tmp_path / "broken"
        broken.mkdir()
        for path in latents.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        file = broken / "codes-00000.npy"
        stored = np.load(file)
        stored[5, 0, 0, 0, 0] = np.nan
        np.save(file, stored)
        for name, config in (("flow", GUIDED), ("diffusion", DIFFUSION)):
            config = config | on(f"encoded:{broken}", kl, posterior="sample")
            run = train(name, config, "--train.num_steps", 6, "--train.batch_size", 4)
            facts = json.loads((run / "checkpoints/step_00000006/state.json").read_text())
            assert facts["skipped_steps"] == 2
            for part in ("model.safetensors", "ema_0.9.safetensors"):
                assert all(bool(tensor.isfinite().all()) for tensor in weights(run, part).values())
            stops = ["--train.batch_size", 4, "--train.max_skipped_steps", 1, "--train.checkpoint_every", 1]
            with pytest.raises(
                UserError, match=r"not finite in 2 steps, so the run stops \(the checkpoint of step [345] is kept\)"
            ) as error:
                main(["--debug", *train.words(f"{name} stopped", config, *stops)])
            assert "\n" not in str(error.value)
            assert all(bool(tensor.isfinite().all()) for tensor in weights(train.folder / f"{name} stopped").values())
            assert not (train.folder / f"{name} stopped" / "model").exists()


class TestAlignment:
    """REPA: features of a frozen network."""

    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    @pytest.fixture
    def vit(self, timm, tmp_path) -> Path:
        torch.manual_seed(1)
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "test_vit.pth")
        return tmp_path / "test_vit.pth"

    @pytest.fixture
    def config(self, kl, photos) -> dict:
        """Trains on images; 4 x 4 tokens."""
        aligned = {"align_depth": 1, "align_dims": [64], "align_hidden": 16}
        return FLOW | {"model": FLOW["model"] | aligned} | on(f"folder:{photos}", kl, image_size=16)

    def encoded(self, kl: Path, photos: Path, out: Path, vit: Path, grid: int) -> str:
        encode_data(kl, f"folder:{photos}", out, features="test_vit", features_weights=vit, features_grid=grid)
        return f"encoded:{out}"

    @pytest.mark.parametrize("path", ["linear", "ddpm"])
    def test_images_and_encoded_sets_align_alike(self, train, config, kl, photos, vit, tmp_path, path):
        if path == "ddpm":
            config = config | {"model": config["model"] | {"path": "ddpm", "prediction": "noise"}}
        words = ["--data.flip", "false", "--data.features", "test_vit", "--data.features_weights", vit, "--train.log_every", 1]
        images = train("images", config, *words)
        lines = [json.loads(line) for line in (images / "metrics.jsonl").read_text().splitlines()]
        assert all(-1 <= line["alignment"] <= 1 for line in lines) and lines[-1]["alignment"] < lines[0]["alignment"]
        spec = self.encoded(kl, photos, tmp_path / "set", vit, 4)
        assert_equal_weights(images, train("encoded", config, "--data.spec", spec), atol=1e-3)  # features are stored in 16 bits

    def test_features_that_are_not_there(self, train, config, kl, latents):
        assert "data.features is missing; name a frozen network" in train.refused(config)
        message = train.refused(config, "--data.spec", f"encoded:{latents}", "--data.posterior", "sample")
        assert str(latents) in message and "encode again with --features" in message
        assert "has no weights" in train.refused(config, "--data.features", "test_vit")

    def test_features_that_nothing_is_aligned_with(self, train, config, vit):
        plain = config | {"model": FLOW["model"]}
        assert "data.features test_vit" in (message := train.refused(plain, "--data.features", "test_vit"))
        assert "set model.align_depth" in message
        assert "data.features_weights" in train.refused(plain, "--data.features_weights", vit)
        assert "data.features_weights" in train.refused(config, "--data.features_weights", vit)

    def test_features_of_another_grid_or_dimension(self, train, config, kl, photos, vit, tmp_path):
        spec = self.encoded(kl, photos, tmp_path / "set", vit, 3)
        message = train.refused(config, "--data.spec", spec)
        assert "9 places, the model has 16 tokens" in message and "--features-grid 4" in message
        message = train.refused(config, "--data.features", "test_vit", "--data.features_weights", vit, "--model.align_dims", "[32]")
        assert "model.align_dims [32]" in message and "[64]" in message
        message = train.refused(config, "--data.spec", spec, "--data.features", "test_vit", "--data.features_weights", vit)
        assert "data.features test_vit" in message and "of its own" in message


def test_what_guidance_needs_is_asked_for(train):
    assert "train.ema_decays is empty" in train.refused(GUIDED, "--train.ema_decays", "[]")
    assert "model.class_dropout is 0" in train.refused(GUIDED, "--model.class_dropout", 0)
    assert "go together" in train.refused(GUIDED, "--model.scale_conditioned", "true")
    assert "go together" in train.refused(GUIDED, "--loss.guidance.scale_max", 2)
