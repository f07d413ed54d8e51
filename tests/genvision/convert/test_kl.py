"""KL autoencoders: one network whatever the layout of the file, and exactly the recorded tensors at the published size."""

import json

import pytest
import torch
from torch import Tensor

from genvision.convert.kl import PREFIX, autoencoder_kl, diffusers_name
from genvision.convert.readers import fill
from genvision.errors import UserError
from parity_fixtures import Fixture, manifest

SD_CONFIG = {  # config.json of sd-vae-ft-ema, which names no scaling_factor
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "act_fn": "silu",
}


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture("diffusers_autoencoderkl")


@pytest.fixture(scope="module")
def key_map(fixture) -> dict[str, str]:
    """CompVis' name to diffusers'."""
    return json.loads(fixture.metadata["key_map"])


@pytest.fixture(scope="module")
def compvis(fixture, key_map) -> dict[str, Tensor]:
    """The fixture's weights as CompVis keeps them."""
    state = {theirs: fixture.state[ours] for theirs, ours in key_map.items()}
    return {name: tensor[..., None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def compvis_config(fixture) -> dict:
    return {"ddconfig": json.loads(fixture.metadata["compvis_ddconfig"]), "embed_dim": 4, "norm_num_groups": 4, "scale_factor": 0.18215}


def convert(state, config):
    module, renamed = autoencoder_kl(state, config)
    fill(module, renamed, "state dict")
    return module.eval()


class TestLayouts:
    def test_every_recorded_name_is_translated(self, key_map):
        assert {name: diffusers_name(name, 3) for name in key_map} == key_map
        assert {name: diffusers_name(name, 3) for name in key_map.values()} == {name: name for name in key_map.values()}

    @pytest.mark.parametrize("kind", ["bare", "prefix", "whole checkpoint", "with losses", "diffusers", "early diffusers"])
    def test_every_layout_gives_the_official_outputs(self, fixture, compvis, compvis_config, kind):
        config = compvis_config
        if kind == "bare":
            state = compvis
        elif kind == "with losses":
            state = compvis | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(4)}
        elif kind in ("prefix", "whole checkpoint"):
            state = {PREFIX + name: tensor for name, tensor in compvis.items()}
            if kind == "whole checkpoint":
                names = ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.x", "betas", "model_ema.decay")
                state |= {name: torch.zeros(4) for name in names} | {f"{PREFIX}loss.logvar": torch.zeros(())}
        else:
            state, config = dict(fixture.state), fixture.config
            if kind == "early diffusers":
                for new, early in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                    state = {name.replace(f".{new}.", f".{early}."): tensor for name, tensor in state.items()}
        model, x, out = convert(state, config), fixture.inputs["x"], fixture.outputs
        with torch.no_grad():
            torch.testing.assert_close(model.encode(x), 0.18215 * out["mean"], atol=fixture.atol, rtol=0)
            torch.testing.assert_close(model.decode(out["latent_scaled"]), out["recon_z"], atol=fixture.atol, rtol=0)
        assert model.spec.image_size == 32

    def test_names_and_options_may_be_of_different_kinds(self, fixture, compvis, compvis_config):
        first, second = convert(compvis, fixture.config), convert(fixture.state, compvis_config)
        assert dict(first.config) == dict(second.config) | {"_use_default_values": first.config["_use_default_values"]}
        assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())

    def test_a_network_of_compvis_without_quant_conv_and_with_a_shift(self, compvis, compvis_config):
        state = {name: tensor for name, tensor in compvis.items() if "quant_conv" not in name}
        flux = compvis_config["ddconfig"] | {"norm_num_groups": 4, "use_quant_conv": False, "scale_factor": 0.3611, "shift_factor": 0.1159}
        model = convert(state, flux)
        assert (model.config.latent_mean, model.config.latent_std) == (0.1159, 1 / 0.3611)
        with pytest.raises(UserError, match="4 tensors do not fit KLTokenizer: missing autoencoder"):
            convert(state, flux | {"use_quant_conv": True})

    def test_attention_stands_on_the_levels_of_its_resolutions(self, compvis_config):
        config = compvis_config | {"ddconfig": compvis_config["ddconfig"] | {"attn_resolutions": [8, 16]}}
        module, _ = autoencoder_kl({}, config)
        assert module.config.attention_levels == (1, 2)
        assert diffusers_name("decoder.up.2.attn.1.proj_out.bias", 3) == "decoder.up_blocks.0.attentions.1.to_out.0.bias"
        assert diffusers_name("encoder.down.2.attn.1.norm.weight", 3) == "encoder.down_blocks.2.attentions.1.group_norm.weight"
        assert "autoencoder.decoder.up_blocks.0.attentions.1.to_out.0.bias" in module.state_dict()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"out_ch": 1}, "ddconfig.out_ch is 1; only 3 is supported"),
            ({"double_z": False}, "ddconfig.double_z is False"),
            ({"dropout": 0.1}, "ddconfig.dropout is 0.1"),
            ({"ch_mult": [2, 2, 2]}, r"ch_mult \[2, 2, 2\]"),
            ({"z_channels": 8}, "embed_dim 4 differs from ddconfig.z_channels 8"),
        ],
    )
    def test_what_the_network_cannot_be_is_refused(self, compvis_config, changes, message):
        with pytest.raises(UserError, match=message):
            autoencoder_kl({}, compvis_config | {"ddconfig": compvis_config["ddconfig"] | changes})

    def test_a_tensor_less_or_more_is_noticed(self, compvis, compvis_config):
        less = {name: tensor for name, tensor in compvis.items() if name != "decoder.norm_out.bias"}
        with pytest.raises(UserError, match=r"1 tensors do not fit KLTokenizer: missing autoencoder\.decoder\.conv_norm_out\.bias 8"):
            convert(less, compvis_config)
        with pytest.raises(UserError, match=r"unexpected autoencoder\.surprise 2x3"):
            convert(compvis | {"surprise": torch.zeros(2, 3)}, compvis_config)


class TestPublishedSize:
    """On the meta device: shapes without memory."""

    def test_the_diffusers_files_have_exactly_our_tensors(self):
        recorded = manifest("diffusers_autoencoderkl_sd_vae_ft_ema")
        with torch.device("meta"):
            state = {name: torch.empty(shape) for name, shape in recorded["tensors"].items()}
            early = {recorded["old_key_aliases"].get(name, name): tensor for name, tensor in state.items()}
            for names in (state, early):
                module = convert(names, SD_CONFIG)
        assert sum(p.numel() for p in module.parameters()) == recorded["params"] == 83_653_863
        assert module.config.latent_std == 1 / 0.18215
        assert (module.spec.image_size, module.spec.code_shape()) == (256, (4, 32, 32))

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_the_compvis_file_has_exactly_our_tensors(self, prefix):
        recorded = manifest("sd_vae_kl_f8_compvis")
        assert {name: diffusers_name(name, 4) for name in recorded["tensors"]} == recorded["diffusers_key"]
        with torch.device("meta"):
            state = {prefix + name: torch.empty(shape) for name, shape in recorded["tensors"].items()}
            module = convert(state, {"ddconfig": recorded["config"], "scale_factor": 0.18215})
            same, _ = autoencoder_kl({}, SD_CONFIG)
        assert sum(p.numel() for p in module.parameters()) == recorded["params"] == 83_653_863
        ignored = {"_use_default_values"}
        assert {k: v for k, v in module.config.items() if k not in ignored} == {k: v for k, v in same.config.items() if k not in ignored}
