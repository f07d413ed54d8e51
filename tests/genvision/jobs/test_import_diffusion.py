"""Diffusion transformers are imported as pipelines that draw: files of training scripts, and folders of diffusers."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from genvision.cli import main
from genvision.errors import UserError
from genvision.jobs.import_official import import_checkpoint
from genvision.pipeline import ImagePipeline
from genvision.preset import Preset
from genvision.presets import PRESETS
from parity_fixtures import Fixture

COMMON = {"million_parameters": 0.1, "image_size": 16, "source": "nowhere, table 0"}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 2, "sample_size": 8}
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 512,  # the published one names the size that it was trained on
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dit() -> Fixture:
    return Fixture("dit_forward")


@pytest.fixture(autouse=True)
def tiny_presets(dit, monkeypatch):
    ancestral = {"method": "ddpm", "num_steps": 3, "guidance_scale": 1.5, "guidance_channels": 3}
    flow = {"method": "heun", "num_steps": 2, "guidance_scale": 1.5, "guidance_channels": 3}
    tiny = {
        "tiny-dit": Preset(component="generator", family="dit", config=dit.config, file="dit.pt", sampler=ancestral, **COMMON),
        "tiny-sit": Preset(component="generator", family="sit", config=dit.config, file="sit.pt", sampler=flow, **COMMON),
        "tiny-dit-diffusers": Preset(
            component="generator",
            family="diffusers-dit",
            config=TRANSFORMER,
            file="tiny",
            sampler={"method": "ddim", "num_steps": 2},
            **COMMON,
        ),
        "tiny-dit-1000": Preset(
            component="generator",
            family="dit",
            config={"hidden_size": 16, "depth": 2, "num_heads": 2, "input_size": 8},
            file="dit1000.pt",
            sampler=ancestral,
            **COMMON,
        ),
        "tiny-kl": Preset(component="tokenizer", family="autoencoder-kl", config=VAE | {"sample_size": 16}, file="kl.pt", **COMMON),
    }
    monkeypatch.setattr("genvision.presets.PRESETS", PRESETS | tiny)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
    """As diffusers itself writes it."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(**TRANSFORMER)
    first = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    DiTPipeline(transformer, AutoencoderKL(**VAE), DDIMScheduler()).save_pretrained(str(folder))
    return folder


@pytest.fixture
def files(dit, pipeline_folder, tmp_path) -> dict[str, Path]:
    """A checkpoint of the training script, and the weights of an autoencoder."""
    plain = {name: tensor + 1 if name != "pos_embed" else tensor for name, tensor in dit.state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": plain, "ema": dit.state, "opt": optimizer, "args": argparse.Namespace(model="DiT-XL/2")}, tmp_path / "dit.pt")
    torch.save(AutoencoderKL.from_pretrained(str(pipeline_folder / "vae")).state_dict(), tmp_path / "kl.pt")
    return {"dit": tmp_path / "dit.pt", "kl": tmp_path / "kl.pt"}


class TestFiles:
    @pytest.mark.parametrize(("name", "sampler"), [("tiny-dit", "DiffusionSampler"), ("tiny-sit", "FlowSampler")])
    def test_weights_and_protocol_of_the_publication_are_taken(self, files, dit, tmp_path, capsys, name, sampler):
        out = tmp_path / "model"
        main(["import", name, str(files["dit"]), "--out", str(out)])
        assert "still missing: tokenizer" in capsys.readouterr().out
        main(["import", "tiny-kl", str(files["kl"]), "--out", str(out)])
        assert "complete" in capsys.readouterr().out
        pipeline = ImagePipeline.from_pretrained(out)
        assert torch.equal(pipeline.generator.head.linear.weight, dit.state["final_layer.linear.weight"])  # ema's, not model's
        assert type(pipeline.sampler).__name__ == sampler
        assert (pipeline.sampler.config["guidance_scale"], pipeline.sampler.config["guidance_channels"]) == (1.5, 3)
        assert pipeline([0, 1], output_type="np").images.shape == (2, 16, 16, 3)
        assert "nowhere, table 0" in (out / "README.md").read_text()

    def test_the_weights_that_are_asked_for_are_taken(self, files, dit, tmp_path):
        import_checkpoint("tiny-dit", files["dit"], tmp_path / "model", weights="model")
        import_checkpoint("tiny-kl", files["kl"], tmp_path / "model")
        generator = ImagePipeline.from_pretrained(tmp_path / "model").generator
        assert torch.equal(generator.head.linear.weight, dit.state["final_layer.linear.weight"] + 1)

    def test_a_file_of_another_family_leaves_nothing(self, files, pipeline_folder, tmp_path):
        weights = pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors"
        for name, file, looks_like in (
            ("tiny-dit", weights, "diffusers-dit, not of dit"),
            ("tiny-kl", files["dit"], "dit or sit, not of autoencoder-kl"),
            ("tiny-sit", files["kl"], "autoencoder-kl, not of sit"),
            ("tiny-dit-diffusers", files["dit"], "dit or sit, not of diffusers-dit"),
        ):
            with pytest.raises(UserError, match=f"{file.name}: looks like a checkpoint of {looks_like}"):
                import_checkpoint(name, file, tmp_path / "model")
            assert not (tmp_path / "model").exists()


class TestFolders:
    @pytest.mark.parametrize("name", ["tiny-dit-1000", "tiny-dit-diffusers"])
    def test_a_whole_pipeline_is_a_whole_model(self, pipeline_folder, tmp_path, name):
        assert import_checkpoint(name, pipeline_folder, tmp_path / "model") == []
        pipeline = ImagePipeline.from_pretrained(tmp_path / "model")
        assert pipeline.generator.config.time_freq_shift == 1 and pipeline.generator.config.norm2_eps == 1e-5
        assert pipeline.label_names[207] == "golden retriever" and pipeline.image_size == 16
        assert pipeline.sampler.config["method"] == ("ddpm" if name == "tiny-dit-1000" else "ddim")
        theirs = DiTPipeline.from_pretrained(str(pipeline_folder))
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.tensor([5, 1000])
        with torch.no_grad():
            torch.testing.assert_close(pipeline.generator(x, t, y), theirs.transformer(x, t, y).sample, atol=1e-5, rtol=0)
            wanted = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample
            torch.testing.assert_close(pipeline.tokenizer.decode(x), wanted, atol=1e-5, rtol=0)

    def test_the_transformer_alone_and_its_file_are_read_too(self, pipeline_folder, tmp_path):
        transformer = pipeline_folder / "transformer"
        for i, file in enumerate((transformer, transformer / "diffusion_pytorch_model.safetensors")):
            assert import_checkpoint("tiny-dit-diffusers", file, tmp_path / f"model{i}") == ["tokenizer"]
        assert import_checkpoint("tiny-dit-1000", transformer, tmp_path / "model") == ["tokenizer"]
        weights = {
            (tmp_path / name / "generator/diffusion_pytorch_model.safetensors").read_bytes() for name in ("model0", "model1", "model")
        }
        assert len(weights) == 1

    def test_early_folders_are_read(self, pipeline_folder, tmp_path):
        """Those of 2022 hold .bin files and call the network Transformer2DModel."""
        old = tmp_path / "old"
        shutil.copytree(pipeline_folder, old)
        for part, class_name in (("transformer", "Transformer2DModel"), ("vae", "AutoencoderKL")):
            model = getattr(DiTPipeline.from_pretrained(str(pipeline_folder)), part)
            (old / part / "diffusion_pytorch_model.safetensors").unlink()
            torch.save(model.state_dict(), old / part / "diffusion_pytorch_model.bin")
            config = json.loads((old / part / "config.json").read_text())
            (old / part / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
        assert import_checkpoint("tiny-dit-1000", old, tmp_path / "from_old") == []
        import_checkpoint("tiny-dit-1000", pipeline_folder, tmp_path / "from_new")
        for part in ("generator", "tokenizer"):
            file = f"{part}/diffusion_pytorch_model.safetensors"
            assert (tmp_path / "from_old" / file).read_bytes() == (tmp_path / "from_new" / file).read_bytes()

    def test_a_tokenizer_that_is_there_stays(self, pipeline_folder, files, tmp_path):
        import_checkpoint("tiny-kl", files["kl"], tmp_path / "model")
        before = contents(tmp_path / "model")
        with pytest.raises(UserError, match="tokenizer: already there"):
            import_checkpoint("tiny-dit-1000", pipeline_folder, tmp_path / "model")
        assert contents(tmp_path / "model") == before
        assert import_checkpoint("tiny-dit-1000", pipeline_folder / "transformer", tmp_path / "model") == []

    def test_damaged_and_strange_folders_are_named(self, pipeline_folder, tmp_path):
        cases = {}
        for name in ("no config", "bad config", "no weights", "other class"):
            cases[name] = tmp_path / name
            shutil.copytree(pipeline_folder / "transformer", cases[name])
        (cases["no config"] / "config.json").unlink()
        (cases["bad config"] / "config.json").write_text("{")
        (cases["no weights"] / "diffusion_pytorch_model.safetensors").unlink()
        (cases["other class"] / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        for name, why in (
            ("no config", r"config\.json: is missing"),
            ("bad config", r"config\.json: is damaged"),
            ("no weights", "holds none of diffusion_pytorch_model"),
            ("other class", "describes a UNet2DModel"),
        ):
            with pytest.raises(UserError, match=why) as caught:
                import_checkpoint("tiny-dit-1000", cases[name], tmp_path / "model")
            assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()

    def test_a_folder_of_another_size_than_the_name_says_is_refused(self, pipeline_folder, tmp_path):
        with pytest.raises(UserError, match="transformer: input_size is 8, the published model has 32"):
            import_checkpoint("dit-xl-2-256", pipeline_folder, tmp_path / "model")
        with pytest.raises(UserError, match=r"is a folder; give the checkpoint file, sit\.pt"):
            import_checkpoint("tiny-sit", pipeline_folder, tmp_path / "model")
        with pytest.raises(UserError, match="only an AutoencoderKL is fetched from the Hub"):
            import_checkpoint("tiny-dit", "hub:facebook/DiT-XL-2-256", tmp_path / "model")
        assert not (tmp_path / "model").exists()
