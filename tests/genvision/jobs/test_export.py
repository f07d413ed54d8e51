"""What other software makes of an exported model: the real diffusers pipeline draws the same images, and original names come back."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file
from torch import Tensor

from genvision.cli import main
from genvision.convert import load_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from genvision.jobs.export import SET_FREQUENCIES, export_model
from genvision.models.dit import DiT
from genvision.pipeline import ImagePipeline
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.randomness import ImageStreams
from genvision.streams import Purpose
from genvision.tokenizers.kl import KLTokenizer

NAMES = [f"class {i}" for i in range(1000)]
LABELS = [3, 999, 207]


def tiny_dit(**options) -> DiT:
    """Every weight is random: one that starts at zero would hide what reads it."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 1000, "learn_sigma": True}
    model = DiT(**(sizes | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_kl(**options) -> KLTokenizer:
    torch.manual_seed(1)
    sizes = {"image_size": 16, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_std": 1 / 0.18215}
    return KLTokenizer(**(sizes | options)).eval()


def save_model(folder: Path, generator=None, tokenizer=None) -> Path:
    generator = tiny_dit() if generator is None else generator
    sampler = DiffusionSampler(method="ddim", num_steps=10, spacing="leading", guidance_scale=3.0)
    names = NAMES[: generator.num_classes]
    ImagePipeline(generator, tiny_kl() if tokenizer is None else tokenizer, sampler, names).save_pretrained(folder)
    return folder


def options_of(model: DiT) -> dict:
    return {name: value for name, value in dict(model.config).items() if not name.startswith("_")}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestDiffusers:
    @pytest.mark.parametrize(
        "options",
        [{}, {"time_freq_shift": 1, "norm2_eps": 1e-5}, {"learn_sigma": False, "time_freq_shift": 1}, {"prediction": "velocity"}],
        ids=["original frequencies", "diffusers' frequencies", "no variance", "v-prediction"],
    )
    def test_the_real_pipeline_draws_the_same_images(self, tmp_path, monkeypatch, options):
        model = save_model(tmp_path / "model", tiny_dit(**options))
        warnings = export_model(model, "diffusers", tmp_path / "out")
        pipe = DiTPipeline.from_pretrained(str(tmp_path / "out"))
        pipe.set_progress_bar_config(disable=True)

        start = ImageStreams(5, range(len(LABELS))).normal(Purpose.START_NOISE, (4, 8, 8))
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: start.clone())

        def theirs() -> Tensor:
            images: Tensor = pipe(LABELS, guidance_scale=3.0, num_inference_steps=10, output_type="pt").images
            return images

        ours = (ImagePipeline.from_pretrained(model)(LABELS, seed=5, output_type="pt").images + 1) / 2
        if "time_freq_shift" not in options:
            assert len(warnings) == 1 and "divides time frequencies by 127" in warnings[0]
            assert (theirs() - ours).abs().max() > 1e-3  # what the warning says
            card = (tmp_path / "out" / "README.md").read_text()
            assert SET_FREQUENCIES in card
            exec(SET_FREQUENCIES, {"pipe": pipe})
        else:
            assert warnings == [] and "downscale_freq_shift" not in (tmp_path / "out" / "README.md").read_text()
        torch.testing.assert_close(theirs(), ours, atol=1e-4, rtol=0)

    def test_the_folder_knows_the_class_names(self, tmp_path):
        export_model(save_model(tmp_path / "model"), "diffusers", tmp_path / "out")
        pipe = DiTPipeline.from_pretrained(str(tmp_path / "out"))
        assert pipe.get_label_ids(["class 3", "class 999"]) == [3, 999]

    def test_it_comes_back_as_it_was(self, tmp_path):
        """But for the frequencies, which a diffusers folder cannot say."""
        model = tiny_dit(time_freq_shift=1)
        export_model(save_model(tmp_path / "model", model), "diffusers", tmp_path / "out")
        config = json.loads((tmp_path / "out/transformer/config.json").read_text())
        back = load_official("diffusers-dit", read_state_dict(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"), config)
        assert options_of(back) == options_of(model)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"path": "linear", "prediction": "velocity"}, "path linear"),
            ({"norm": "rms"}, "norm rms"),
            ({"mlp": "swiglu"}, "mlp swiglu"),
            ({"mlp_ratio": 2.0}, r"mlp_ratio 2\.0"),
            ({"use_rope": True}, "use_rope True"),
            ({"use_qk_norm": True}, "use_qk_norm True"),
            ({"use_shift": False}, "use_shift False"),
            ({"scale_conditioned": True}, "scale_conditioned True"),
            ({"time_scale": 2.0}, r"time_scale 2\.0"),
            ({"time_freq_shift": 2}, "time_freq_shift 2"),
            ({"class_dropout": 0.0}, "class_dropout 0"),
            ({"num_classes": 10}, "num_classes 10"),
        ],
    )
    def test_what_diffusers_cannot_express_is_named(self, tmp_path, options, named):
        sampler = DiffusionSampler(method="ddim", num_steps=10, spacing="leading")
        generator = tiny_dit(**options)
        ImagePipeline(generator, tiny_kl(), sampler, NAMES[: generator.num_classes]).save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=named) as caught:
            export_model(tmp_path / "model", "diffusers", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    @pytest.mark.parametrize(
        ("options", "named"), [({"latent_mean": 0.5}, r"latent_mean 0\.5"), ({"latent_std": (1.0, 1.0, 2.0, 1.0)}, "latent_std differs")]
    )
    def test_latents_that_the_pipeline_would_decode_wrongly_are_refused(self, tmp_path, options, named):
        model = save_model(tmp_path / "model", tokenizer=tiny_kl(**options))
        with pytest.raises(UserError, match=named):
            export_model(model, "diffusers", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestOfficial:
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize(
        ("family", "options", "config"),
        [
            ("dit", {}, {}),
            ("sit", {"path": "gvp", "prediction": "velocity", "time_input": "toward_data"}, {"path_type": "GVP"}),
            (
                "lightningdit",
                {
                    "path": "linear",
                    "prediction": "velocity",
                    "time_input": "toward_data",
                    "norm": "rms",
                    "mlp": "swiglu",
                    "use_rope": True,
                    "use_qk_norm": True,
                    "use_shift": False,
                },
                {"use_rmsnorm": True, "use_swiglu": True, "use_rope": True, "use_qknorm": True, "wo_shift": True, "learn_sigma": True},
            ),
        ],
        ids=["dit", "sit", "lightningdit"],
    )
    def test_original_names_come_back_as_the_same_model(self, tmp_path, family, options, config, suffix):
        model = tiny_dit(**options)
        file = tmp_path / "new folder" / f"weights{suffix}"
        assert export_model(save_model(tmp_path / "model", model), "official", file) == []
        state = read_state_dict(file)
        assert {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.bias"} <= state.keys()
        sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4}
        back = load_official(family, state, sizes | config)
        assert options_of(back) == options_of(model)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())

    def test_frequencies_of_diffusers_are_warned_of(self, tmp_path):
        model = save_model(tmp_path / "model", tiny_dit(time_freq_shift=1))
        (warning,) = export_model(model, "official", tmp_path / "x.pt")
        assert "128" in warning and "127" in warning

    def test_a_prediction_that_the_original_sampler_would_misread_is_warned_of(self, tmp_path):
        model = save_model(tmp_path / "model", tiny_dit(prediction="velocity"))
        (warning,) = export_model(model, "official", tmp_path / "x.pt")
        assert "predicts velocity" in warning

    def test_what_the_original_code_cannot_compute_is_named(self, tmp_path):
        model = save_model(tmp_path / "model", tiny_dit(time_scale=1000.0))
        with pytest.raises(UserError, match=r"time_scale 1000\.0"):
            export_model(model, "official", tmp_path / "x.pt")
        assert not (tmp_path / "x.pt").exists()


class TestTarget:
    def test_what_is_there_stays(self, tmp_path):
        model = save_model(tmp_path / "model")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note.txt").write_text("mine")
        (tmp_path / "x.pt").write_text("mine")
        before = contents(tmp_path)
        for form, out in (("diffusers", "full"), ("diffusers", "x.pt"), ("official", "x.pt")):
            with pytest.raises(UserError, match="already"):
                export_model(model, form, tmp_path / out)
        for out in ("full", "weights.bin"):
            with pytest.raises(UserError, match=r"ends in \.pt or \.safetensors"):
                export_model(model, "official", tmp_path / out)
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("form", ["diffusers", "official"])
    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch, form):
        model = save_model(tmp_path / "model")

        def full(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr("diffusers.DDIMScheduler.save_pretrained", full)
        monkeypatch.setattr("torch.save", full)
        with pytest.raises(OSError, match="no space"):
            export_model(model, form, tmp_path / "out.pt")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_a_folder_that_is_no_model_is_named(self, tmp_path):
        for form in ("diffusers", "official"):
            with pytest.raises(UserError, match="no such folder"):
                export_model(tmp_path / "nothing", form, tmp_path / "out.pt")

    def test_the_command_prints_the_warning_and_where_it_is(self, tmp_path, capsys):
        model = save_model(tmp_path / "model")
        main(["export", "--model", str(model), "--format", "diffusers", "--out", str(tmp_path / "out")])
        warning, said = capsys.readouterr().out.strip().splitlines()
        assert warning.startswith("warning: diffusers divides") and said == f"{tmp_path / 'out'}: {model} exported"
        main(["export", "--model", str(model), "--format", "official", "--out", str(tmp_path / "x.safetensors")])
        assert "pos_embed" in load_file(tmp_path / "x.safetensors")
        with pytest.raises(SystemExit) as exit_status:
            main(["export", "--model", str(model), "--format", "onnx", "--out", str(tmp_path / "y")])
        assert exit_status.value.code == 2
