"""Diffusion transformers of the original implementations: their outputs, their recorded sizes, and what must not be taken for them."""

import math

import pytest
import torch
from safetensors.torch import load_file

from genvision.convert import FAMILIES, containers, load_official
from genvision.convert.diffusers_dit import to_diffusers
from genvision.convert.dit import to_official
from genvision.convert.readers import read_state_dict
from genvision.errors import UserError
from parity_fixtures import FOLDER, Fixture, manifest

FIXTURES = {
    "dit_forward": "dit",
    "sit_forward": "sit",
    "lightningdit_forward": "lightningdit",
    "lightningdit_qknorm": "lightningdit",
    "lightningdit_woshift": "lightningdit",
    "mg_scale_aware": "sit",
    "repa_sample": "repa-sit",
}
SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
"""Depth, width, heads."""


def arguments(size: str, patch_size: int, **others) -> dict:
    depth, hidden_size, num_heads = SIZES[size]
    return {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads, "patch_size": patch_size, "learn_sigma": True} | others


LIGHTNING = {"input_size": 16, "in_channels": 32, "use_rmsnorm": True, "use_swiglu": True, "use_rope": True, "learn_sigma": False}
MANIFESTS = (
    {f"dit_{size}_{patch}": ("dit", arguments(size, patch)) for size in SIZES for patch in (2, 4, 8)}
    | {"dit_xl_2_512": ("dit", arguments("xl", 2, input_size=64))}
    | {"sit_xl_2": ("sit", arguments("xl", 2)), "sit_xl_2_mg": ("sit", arguments("xl", 2, learn_sigma=False, time="toward_noise"))}
    | {"repa_sit_xl_2": ("repa-sit", arguments("xl", 2)), "lightningdit_xl_1": ("lightningdit", arguments("xl", 1, **LIGHTNING))}
)
"""Recorded checkpoint to its family and arguments."""


@pytest.fixture(scope="module")
def dit() -> Fixture:
    return Fixture("dit_forward")


@pytest.fixture(scope="module")
def diffusers_dit() -> Fixture:
    return Fixture("diffusers_dit")


def load(name: str):
    fixture = Fixture(name)
    return fixture, load_official(FIXTURES[name], fixture.state, fixture.config)


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


class TestOutputs:
    @pytest.mark.parametrize("name", FIXTURES)
    @torch.inference_mode()
    def test_the_output_is_the_original_one(self, name):
        fixture, model = load(name)
        inputs = fixture.inputs
        scale = {"scale": inputs["s"]} if "s" in inputs else {}
        close(model(inputs["x"], inputs["t"], inputs["y"], **scale), fixture.outputs["out"], fixture.atol)

    @torch.inference_mode()
    def test_fractions_of_steps_and_what_lies_between_are_the_original_ones(self, dit):
        model, inputs, outputs = load_official("dit", dit.state, dit.config), dit.inputs, dit.outputs
        x, t, y = inputs["x"], inputs["t"], inputs["y"]
        close(model(x, inputs["t_fractional"], y), outputs["out_fractional_t"], dit.atol)
        close(model.time_embed.features(t), outputs["t_freq"], dit.atol)
        close(model.time_embed(t), outputs["t_emb"], dit.atol)
        close(model.label_embed(y).squeeze(1), outputs["y_emb"], dit.atol)
        close(model.patch_embed(x), outputs["patch_tokens"], dit.atol)
        modulation = model.modulation_rows(t, y)
        close(model(x, t, y, modulation=modulation), outputs["out"], dit.atol)
        parts = modulation.split([6 * 48, 6 * 48, 2 * 48], dim=1)
        hidden = model.patch_embed(x) + model.positions
        for i, block in enumerate(model.blocks):
            hidden = block(hidden, parts[i], model.rotary)
            close(hidden, outputs[f"block{i}"], dit.atol)
        close(model.head(hidden, parts[2]), outputs["final_tokens"], dit.atol)

    @pytest.mark.parametrize("name", ["lightningdit_forward", "lightningdit_qknorm", "lightningdit_woshift"])
    @torch.inference_mode()
    def test_blocks_of_lightningdit_are_the_original_ones(self, name):
        fixture, model = load(name)
        x, t, y = (fixture.inputs[key] for key in ("x", "t", "y"))
        condition = torch.nn.functional.silu(model.condition(t, y))
        hidden = model.patch_embed(x) + model.positions
        for i, block in enumerate(model.blocks):
            hidden = block.conditioned(hidden, condition, model.rotary)
            close(hidden, fixture.outputs[f"block{i}"], fixture.atol)

    @torch.inference_mode()
    def test_aligned_features_of_repa_are_the_original_ones(self):
        fixture, model = load("repa_sample")
        output, (features,) = model(*(fixture.inputs[key] for key in ("x", "t", "y")), with_features=True)
        close(output, fixture.outputs["out"], fixture.atol)
        close(features, fixture.outputs["zs"], fixture.atol)

    @torch.inference_mode()
    def test_a_scale_of_zero_is_told_to_a_scale_aware_model(self):
        fixture, model = load("mg_scale_aware")
        x, t, y = (fixture.inputs[key] for key in ("x", "t", "y"))
        close(model(x, t, y, scale=torch.zeros(len(x))), fixture.outputs["out_s0"], fixture.atol)

    @torch.inference_mode()
    def test_diffusers_and_the_original_each_have_their_frequencies(self, diffusers_dit):
        fixture = diffusers_dit
        theirs, original = fixture.config["diffusers"], fixture.config["fb"]
        x, t, y = (fixture.inputs[key] for key in ("x", "t", "y"))
        model = load_official("diffusers-dit", fixture.state, theirs)
        close(model(x, t, y), fixture.outputs["out"], fixture.atol)
        close(model.time_embed.features(t), fixture.outputs["t_freq_diffusers"], fixture.atol)
        half = model(fixture.inputs["cfg_x"].repeat(2, 1, 1, 1), fixture.inputs["cfg_t"], fixture.inputs["cfg_y"])
        conditional, null = half[:, :4].chunk(2)
        close(null + 4.0 * (conditional - null), fixture.outputs["cfg_out"][:2, :4], 2 * fixture.atol)
        model.time_embed.freq_shift = 0
        close(model(x, t, y), fixture.outputs["out_freq_shift0"], fixture.atol)
        tensors = load_file(FOLDER / "diffusers_dit.safetensors")
        fb_state = {name.removeprefix("fb_state/"): tensor for name, tensor in tensors.items() if name.startswith("fb_state/")}
        model = load_official("dit", fb_state, original)
        close(model(x, t, y), fixture.outputs["fb_out"], fixture.atol)
        close(model.time_embed.features(t), fixture.outputs["t_freq_fb"], fixture.atol)


class TestBothWays:
    @pytest.mark.parametrize("name", FIXTURES)
    def test_original_names_and_tables_come_back(self, name):
        fixture, model = load(name)
        back = to_official(model)
        assert back.keys() == fixture.state.keys()
        for key, tensor in fixture.state.items():
            close(back[key], tensor, 1e-6 if key == "pos_embed" or "feat_rope" in key else 0)

    def test_diffusers_names_come_back(self, diffusers_dit):
        config, state = to_diffusers(load_official("diffusers-dit", diffusers_dit.state, diffusers_dit.config["diffusers"]))
        assert state.keys() == diffusers_dit.state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in diffusers_dit.state.items())
        assert diffusers_dit.config["diffusers"].items() <= config.items()


class TestSizes:
    """On the meta device: shapes without memory."""

    @pytest.mark.parametrize("name", MANIFESTS)
    def test_our_module_has_exactly_the_recorded_tensors(self, name):
        recorded = manifest(name)
        family, config = MANIFESTS[name]
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in recorded["tensors"].items()}
            model = load_official(family, state, config)
            back = to_official(model)
        assert {key: list(tensor.shape) for key, tensor in back.items()} == recorded["tensors"]
        tables = sum(math.prod(recorded["tensors"][key]) for key in recorded["tensors"] if key == "pos_embed" or "feat_rope" in key)
        assert sum(p.numel() for p in model.parameters()) + tables == recorded["params"]
        assert sum(p.numel() for p in model.parameters()) == recorded.get("trainable_params", recorded["params"] - tables)
        assert config.items() >= {key: value for key, value in recorded.get("config", {}).items() if key in config}.items()

    def test_diffusers_has_exactly_the_recorded_tensors(self):
        recorded = manifest("diffusers_dit_xl_2_256")
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in recorded["tensors"].items()}
            model = load_official("diffusers-dit", state, {"out_channels": 8})
            _, back = to_diffusers(model)
        assert {key: list(tensor.shape) for key, tensor in back.items()} == recorded["tensors"]
        copies = sum(math.prod(shape) for key, shape in recorded["tensors"].items() if ".emb." in key and "_blocks.0." not in key)
        assert sum(p.numel() for p in model.parameters()) + copies == recorded["params"]

    @pytest.mark.parametrize("name", ["dit_s_8", "lightningdit_xl_1", "repa_sit_xl_2"])
    def test_one_tensor_less_or_more_is_noticed(self, name):
        family, config = MANIFESTS[name]
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in manifest(name)["tensors"].items()}
            for key in [key for key in state if key != "pos_embed" and "feat_rope" not in key][::60]:
                with pytest.raises(UserError, match="1 tensors do not fit"):
                    load_official(family, {other: tensor for other, tensor in state.items() if other != key}, config)
            with pytest.raises(UserError, match=r"unexpected blocks\.0\.surprise 2x3"):
                load_official(family, state | {"blocks.0.surprise": torch.empty(2, 3)}, config)


class TestMeaning:
    """What the options say of path, prediction and time."""

    @pytest.mark.parametrize(
        ("family", "config", "meaning"),
        [
            ("dit", {}, ("ddpm", "noise", "step")),
            ("sit", {}, ("linear", "velocity", "toward_data")),
            ("sit", {"path_type": "GVP", "prediction": "score"}, ("gvp", "score", "toward_data")),
            ("sit", {"path_type": "VP", "prediction": "noise"}, ("vp", "noise", "toward_data")),
            ("sit", {"time": "toward_noise"}, ("linear", "velocity", "toward_noise")),
            ("sit", {"scale_aware": True}, ("linear", "velocity", "toward_noise")),
            ("lightningdit", {}, ("linear", "velocity", "toward_data")),
            ("repa-sit", {}, ("linear", "velocity", "toward_noise")),
            ("repa-sit", {"path_type": "cosine", "z_dims": []}, ("gvp", "velocity", "toward_noise")),
            ("diffusers-dit", {}, ("ddpm", "noise", "step")),
        ],
    )
    def test_each_family_has_its_own(self, family, config, meaning):
        sizes = {"hidden_size": 16, "depth": 2, "encoder_depth": 1, "num_heads": 2, "num_layers": 2, "num_attention_heads": 2}
        with torch.device("meta"):
            model, _ = FAMILIES[family]({}, sizes | {"attention_head_dim": 8} | config)
        assert (model.config.path, model.config.prediction, model.config.time_input) == meaning
        assert model.config.time_scale == 1.0
        assert model.config.time_freq_shift == (1 if family == "diffusers-dit" else 0)

    @pytest.mark.parametrize(
        ("family", "config", "named"),
        [
            ("sit", {"path_type": "Cubic"}, "path_type 'Cubic' is unknown; choose one of Linear, GVP, VP"),
            ("repa-sit", {"path_type": "edm"}, "path_type 'edm' is unknown; choose one of linear, cosine"),
            ("repa-sit", {"hidden_size": 32, "decoder_hidden_size": 48}, "decoder_hidden_size 48 differs"),
            ("diffusers-dit", {"activation_fn": "geglu"}, "activation_fn is geglu; only gelu-approximate"),
            ("diffusers-dit", {"out_channels": 5}, "out_channels is 5"),
        ],
    )
    def test_options_of_another_network_are_named(self, family, config, named):
        with pytest.raises(UserError, match=f"^file.pt: {named}"):
            load_official(family, {}, config, source="file.pt")


class TestTables:
    def test_other_positions_than_ours_are_refused(self, dit):
        with pytest.raises(UserError, match=r"x\.pt: pos_embed differs by 0\.001"):
            load_official("dit", dit.state | {"pos_embed": dit.state["pos_embed"] + 1e-3}, dit.config, source="x.pt")
        with pytest.raises(UserError, match="pos_embed differs by nan"):
            load_official("dit", dit.state | {"pos_embed": dit.state["pos_embed"] * torch.nan}, dit.config)
        rows_first = dit.state["pos_embed"].unflatten(2, (2, -1)).flip(2).flatten(2)  # a usual mistake
        with pytest.raises(UserError, match="pos_embed differs"):
            load_official("dit", dit.state | {"pos_embed": rows_first}, dit.config)

    def test_other_rotations_than_ours_are_refused(self):
        fixture = Fixture("lightningdit_forward")
        for name in ("feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            with pytest.raises(UserError, match=f"{name} differs"):
                load_official("lightningdit", fixture.state | {name: fixture.state[name].flip(1)}, fixture.config)
        with pytest.raises(UserError, match="freqs_cos is in the checkpoint, but use_rope is off"):
            load_official("lightningdit", fixture.state, fixture.config | {"use_rope": False})

    def test_latents_of_another_size_are_told_from_them(self, dit):
        with pytest.raises(UserError, match="pos_embed has 16 positions, expected 64: the checkpoint is for latents of another size"):
            load_official("dit", dit.state, dit.config | {"input_size": 16})

    def test_tables_may_be_missing_or_of_half_precision(self, dit):
        whole = load_official("dit", dit.state, dit.config)
        for state in (
            {name: tensor for name, tensor in dit.state.items() if name != "pos_embed"},
            dit.state | {"pos_embed": dit.state["pos_embed"].bfloat16()},
        ):
            model = load_official("dit", state, dit.config)
            assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


class TestFiles:
    def test_the_averaged_weights_of_a_training_file_are_preferred(self, dit, tmp_path):
        ema = {name: tensor + 1 for name, tensor in dit.state.items()}
        torch.save({"model": dit.state, "ema": ema, "opt": {"state": {}}}, tmp_path / "file.pt")
        for family in ("dit", "sit", "lightningdit", "repa-sit"):
            assert torch.equal(read_state_dict(tmp_path / "file.pt", prefer=containers(family))["pos_embed"], ema["pos_embed"])
        assert torch.equal(read_state_dict(tmp_path / "file.pt", "model", prefer=containers("dit"))["pos_embed"], dit.state["pos_embed"])
        assert torch.equal(read_state_dict(tmp_path / "file.pt", prefer=containers("llamagen-gpt"))["pos_embed"], dit.state["pos_embed"])

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_names_of_parallel_and_compiled_training_are_read(self, dit, prefix):
        model = load_official("dit", {prefix + name: tensor for name, tensor in dit.state.items()}, dit.config)
        assert torch.equal(model.head.linear.weight, dit.state["final_layer.linear.weight"])

    def test_early_files_of_repa_count_the_decoder_anew(self):
        fixture = Fixture("repa_sample")
        early = {name.replace("blocks.1.", "decoder_blocks.0."): tensor for name, tensor in fixture.state.items()}
        assert early.keys() != fixture.state.keys()
        model = load_official("repa-sit", early, fixture.config)
        assert torch.equal(model.blocks[1].attn.qkv.weight, fixture.state["blocks.1.attn.qkv.weight"])

    def test_blocks_with_embedders_of_their_own_are_refused(self, diffusers_dit):
        state, config = dict(diffusers_dit.state), diffusers_dit.config["diffusers"]
        name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
        with pytest.raises(UserError, match=rf"x\.pt: {name} differs from that of block 0"):
            load_official("diffusers-dit", state | {name: state[name] + 1e-6}, config, source="x.pt")
        del state[name]
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_official("diffusers-dit", state, config)

    def test_another_family_is_named(self, dit, diffusers_dit):
        repa, lightning = Fixture("repa_sample"), Fixture("lightningdit_forward")
        for family, state, config, looks_like in (
            ("dit", repa.state, repa.config, "repa-sit"),
            ("repa-sit", dit.state, repa.config, "dit or sit"),
            ("sit", lightning.state, dit.config, "lightningdit"),
            ("dit", diffusers_dit.state, dit.config, "diffusers-dit"),
            ("diffusers-dit", dit.state, diffusers_dit.config["diffusers"], "dit or sit"),
        ):
            with pytest.raises(UserError, match=f"looks like a checkpoint of {looks_like}, not of {family}"):
                load_official(family, state, config)

    def test_what_cannot_be_told_apart_is_listed_instead(self, dit):
        with pytest.raises(UserError, match=r"1 tensors do not fit DiT: missing head\.linear\.bias 32"):
            load_official("sit", {name: tensor for name, tensor in dit.state.items() if name != "final_layer.linear.bias"}, dit.config)
