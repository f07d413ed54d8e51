import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from genvision.convert.kl import autoencoder_kl
from genvision.convert.readers import fill
from genvision.errors import UserError
from genvision.tokenizers.base import content_hash, load_tokenizer
from genvision.tokenizers.kl import KLTokenizer, from_diffusers_config
from parity_fixtures import Fixture

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(**changes) -> KLTokenizer:
    options = dict(image_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    return KLTokenizer(**(options | changes))


def pictures(num: int = 2) -> torch.Tensor:
    return torch.rand(num, 3, 16, 16) * 2 - 1


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def official() -> AutoencoderKL:
    """A tiny network of diffusers with attention at the lower level, made by diffusers."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=2,
        sample_size=16,
    )


class TestParity:
    @pytest.fixture
    def fixture(self) -> Fixture:
        return Fixture("diffusers_autoencoderkl")

    @pytest.fixture
    def model(self, fixture) -> KLTokenizer:
        module, state = autoencoder_kl(fixture.state, fixture.config)
        fill(module, state, "fixture")
        return module.eval()

    def test_latents_and_images_equal_the_official_ones(self, model, fixture):
        x, out = fixture.inputs["x"], fixture.outputs
        with torch.no_grad():
            mean, logvar = model.moments(x)
            close(mean, out["mean"], fixture.atol)
            close(logvar, out["logvar"], fixture.atol)
            close(model.encode(x), 0.18215 * out["mean"], fixture.atol)
            close(model.posterior(x)[1], 0.18215 * (0.5 * out["logvar"]).exp(), fixture.atol)
            close(model.decode(model.encode(x)), out["recon_mode"], fixture.atol)
            close(model.normalize(out["z"]), out["latent_scaled"], fixture.atol)
            close(model.decode(out["latent_scaled"]), out["recon_z"], fixture.atol)
            close(model(x).reconstruction, out["recon_mode"], fixture.atol)

    def test_the_loss_is_the_official_kl_averaged_over_images(self, model, fixture):
        kl = model(fixture.inputs["x"]).losses["kl"]
        torch.testing.assert_close(kl, 1e-6 * fixture.outputs["kl"].mean())

    def test_training_decodes_a_sample_of_the_posterior(self, model, fixture):
        x, out = fixture.inputs["x"], fixture.outputs
        model.train()
        torch.manual_seed(3)
        with torch.no_grad():
            first, second = model(x).reconstruction, model(x).reconstruction
            torch.manual_seed(3)
            z = out["mean"] + (0.5 * out["logvar"]).exp() * torch.randn(2, 4, 8, 8)
            close(first, model.decode(model.normalize(z)), fixture.atol)
        assert not torch.equal(first, second)


class TestStandardisation:
    def test_statistics_by_channel_are_applied_and_undone(self):
        plain, images = tiny().eval(), pictures()
        mean, std = (1.0, -2.0, 0.5, 0.0), (2.0, 0.5, 1.0, 4.0)
        model = tiny(latent_mean=mean, latent_std=std).eval()
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            z, latents = plain.encode(images), model.encode(images)
            for channel in range(4):
                close(latents[:, channel], (z[:, channel] - mean[channel]) / std[channel], 1e-6)
            close(model.decode(latents), plain.decode(z), 1e-5)
            assert torch.equal(model.moments(images)[0], plain.moments(images)[0])
            assert torch.equal(model(images).reconstruction, plain(images).reconstruction)

    @pytest.mark.parametrize(
        ("facts", "mean", "std"),
        [
            ({"scaling_factor": 0.18215}, 0.0, 1 / 0.18215),
            ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 1 / 0.3611),
            ({"scaling_factor": 0.5, "latents_mean": [1.0, -1.0], "latents_std": [2.0, 3.0]}, (1.0, -1.0), (4.0, 6.0)),
            ({}, 0.0, 1 / 0.18215),
        ],
    )
    def test_diffusers_statistics_are_taken_over(self, facts, mean, std):
        arguments = from_diffusers_config({"latent_channels": 2} | facts)
        assert (arguments["latent_mean"], arguments["latent_std"]) == (mean, std)


class TestDiffusersFolders:
    def test_a_folder_of_diffusers_is_read(self, official, tmp_path):
        official.register_to_config(scaling_factor=0.25, shift_factor=0.5)
        official.save_pretrained(tmp_path)
        model, x = KLTokenizer.from_diffusers(tmp_path), pictures()
        assert not model.training and not any(p.is_meta for p in model.parameters())
        assert (model.spec.image_size, model.spec.downsample, model.spec.channels) == (16, 2, 2)
        assert model.config.attention_levels == (1,)
        with torch.no_grad():
            mean = official.encode(x).latent_dist.mean
            assert torch.equal(model.moments(x)[0], mean)
            close(model.encode(x), (mean - 0.5) * 0.25, 1e-6)
            close(model.decode(model.encode(x)), official.decode(mean).sample, 1e-5)
        assert KLTokenizer.from_diffusers(tmp_path, image_size=32).spec.image_size == 32
        model.save_pretrained(tmp_path / "ours" / "tokenizer")
        again = load_tokenizer(tmp_path / "ours")
        assert content_hash(again) == content_hash(model)

    @pytest.mark.parametrize(
        ("statistics", "facts"),
        [
            ({}, (1.0, None, None, None)),
            ({"latent_std": 1 / 0.13025}, (0.13025, None, None, None)),
            ({"latent_mean": 0.1, "latent_std": (2.0,)}, (0.5, 0.1, None, None)),
            ({"latent_mean": (0.0, 1.0, 2.0, 3.0), "latent_std": 0.5}, (1.0, None, [0.0, 1.0, 2.0, 3.0], [0.5] * 4)),
        ],
    )
    def test_diffusers_reads_what_is_written_and_so_do_we(self, tmp_path, statistics, facts):
        model, x = tiny(attention_levels=(1,), image_size=32, use_quant_conv=False, **statistics).eval(), pictures()
        model.to_diffusers(tmp_path)
        theirs, again = AutoencoderKL.from_pretrained(tmp_path), KLTokenizer.from_diffusers(tmp_path)
        with torch.no_grad():
            z, latents = theirs.encode(x).latent_dist.mean, model.encode(x)
            assert torch.equal(z, model.moments(x)[0])
            assert torch.equal(theirs.decode(z).sample, model(x).reconstruction)
            close(again.encode(x), latents, 1e-6)
            close(again.decode(latents), model.decode(latents), 1e-5)
        assert again.spec == model.spec
        assert (
            theirs.config.scaling_factor == {0: 1.0, 1: 0.13025, 2: 0.5 if statistics.get("latent_mean") == 0.1 else 1.0}[len(statistics)]
        )

    def test_attention_names_of_early_diffusers_are_read(self, official, tmp_path):
        official.save_pretrained(tmp_path)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = load_file(tmp_path / WEIGHTS)
        renamed = dict(state)
        for new, early in old.items():
            renamed = {name.replace(f".{new}.", f".{early}."): tensor for name, tensor in renamed.items()}
        assert any(".proj_attn." in name for name in renamed)
        save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
        model = KLTokenizer.from_diffusers(tmp_path)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.autoencoder.state_dict().items())

    def test_half_precision_files_become_float32(self, official, tmp_path):
        official.save_pretrained(tmp_path)
        state = {name: tensor.half() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
        save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
        assert KLTokenizer.from_diffusers(tmp_path).last_layer.dtype == torch.float32

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("truncate", "cannot be loaded"),
            ("missing", "1 tensors do not fit its config.json: missing decoder.conv_in.bias"),
            ("unexpected", "unexpected surprise"),
            ("shape", "cannot be loaded"),
            ("nan", "not finite decoder.conv_in.bias"),
            ("no config", "no config.json here"),
            ("no weights", "cannot be loaded"),
            ("channels", "in_channels is 4"),
            ("blocks", "up_block_types"),
        ],
    )
    def test_a_damaged_folder_is_one_line(self, official, tmp_path, damage, message):
        official.save_pretrained(tmp_path)
        path, config = tmp_path / WEIGHTS, tmp_path / "config.json"
        state = load_file(path)
        if damage == "truncate":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "no config":
            config.unlink()
        elif damage == "no weights":
            path.unlink()
        elif damage in ("channels", "blocks"):
            other = {"in_channels": 4} if damage == "channels" else {"up_block_types": ["UpDecoderBlock2D"] * 2}
            config.write_text(json.dumps(json.loads(config.read_text()) | other))
            network = AutoencoderKL.from_config(json.loads(config.read_text()))
            network.save_pretrained(tmp_path)
        else:
            name = "decoder.conv_in.bias"
            changed = {"unexpected": {"surprise": torch.zeros(2)}, "shape": {name: torch.zeros(3)}, "nan": {name: state[name] * torch.nan}}
            state |= changed.get(damage, {})
            if damage == "missing":
                del state[name]
            save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message) as error:
            KLTokenizer.from_diffusers(tmp_path)
        assert "\n" not in str(error.value)


def test_loss_falls_on_one_batch_and_gradients_reach_every_parameter():
    model = tiny(kl_weight=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = pictures(4)
    losses = []
    for _ in range(40):
        output = model(x)
        loss = (output.reconstruction - x).square().mean() + output.losses["kl"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    # a bias of keys shifts all logits of a query alike: its gradient is rounding
    assert all(p.grad is not None and (p.grad.abs().sum() > 0 or "to_k.bias" in name) for name, p in model.named_parameters())
    assert output.codes is None and output.z is None and model.last_layer.shape == (3, 8, 3, 3)


def test_saved_and_loaded_tokenizer_gives_equal_latents_images_and_hash(tmp_path):
    model = tiny(latent_mean=(0.0, 1.0, 2.0, 3.0), latent_std=2.0, attention_levels=(0,)).eval()
    model.save_pretrained(tmp_path / "tokenizer")
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text())["latent_mean"] == [0.0, 1.0, 2.0, 3.0]
    again, x = load_tokenizer(tmp_path), pictures()
    with torch.no_grad():
        assert torch.equal(again.encode(x), model.encode(x))
        assert torch.equal(again.decode(model.encode(x)), model.decode(model.encode(x)))
    assert content_hash(again) == content_hash(model)
    again.register_to_config(latent_std=3.0)
    assert content_hash(again) != content_hash(model)


def test_spec_says_what_latents_look_like():
    model = tiny(block_out_channels=(8, 8, 8), latent_channels=3).eval()
    assert (model.spec.downsample, model.spec.channels, model.spec.discrete) == (4, 3, False)
    assert model.spec.code_shape() == (3, 4, 4)
    assert model.encode(torch.zeros(1, 3, 12, 20)).shape == (1, 3, 3, 5)


def test_latents_of_another_precision_are_decoded():
    model = tiny().eval()
    latents = torch.randn(1, 4, 8, 8)
    assert model.bfloat16().decode(latents).dtype == torch.bfloat16
    assert model.encode(pictures(1)).dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    torch.compile(tiny().train(), fullgraph=True, backend="eager")(pictures())  # raises at a break


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be at least 1"),
        ({"norm_num_groups": 3}, r"block_out_channels \[8, 8\] must be multiples of norm_num_groups, 3"),
        ({"attention_levels": (2,)}, r"attention_levels \[2\] must lie in 0 .. 1"),
        ({"latent_std": 0.0}, "latent_std must be above 0"),
        ({"latent_mean": (1.0, 2.0)}, "latent_mean has 2 values"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more"),
        ({"image_size": 15}, "multiple of 2"),
        ({"act_fn": "silly"}, "act_fn 'silly'"),
    ],
)
def test_wrong_options_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 1, 16, 16), "convert them to RGB"),
        ("encode", (1, 3, 16, 15), "multiple of 2"),
        ("encode", (1, 3, 2, 16, 16), r"\[B, 3, H, W\] is expected"),
        ("decode", (1, 3, 8, 8), "have 4 channels"),
        ("decode", (1, 4, 64), r"\[B, 4, h, w\] is expected"),
    ],
)
def test_wrong_input_is_one_line(method, shape, message):
    with pytest.raises(UserError, match=message) as error:
        getattr(tiny(), method)(torch.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_diffusers_networks_are_imported_only_where_one_is_made():
    code = "import sys, genvision.tokenizers.kl; assert 'diffusers.models.autoencoders.autoencoder_kl' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
