"""Published models by name agree with the recorded lists of their tensors."""

from functools import cache

import pytest
import torch

from genvision.convert import FAMILIES, load_official
from genvision.errors import UserError
from genvision.jobs.import_official import default_sampler, imagenet_label_names
from genvision.presets import PRESETS, find_preset, format_preset, format_presets
from parity_fixtures import manifest

RECORDED = {
    "llamagen-vq16": "llamagen_vq16",
    "llamagen-vq8": "llamagen_vq8",
    "vqgan-imagenet-f16-1024": "taming_vqgan_imagenet_f16_1024",
    "vqgan-imagenet-f16-16384": "taming_vqgan_imagenet_f16_16384",
    "maskgit-vqgan": "maskgit_vqgan",
    "mage-vqgan": "mage_vqgan",
    "sd-vae-ft-ema": "diffusers_autoencoderkl_sd_vae_ft_ema",
    "sd-vae-ft-mse": "diffusers_autoencoderkl_sd_vae_ft_ema",
    "sd-vae-kl-f8": "sd_vae_kl_f8_compvis",
    "titok-l-32": "titok_l32",
    "titok-b-64": "titok_b64",
    "titok-s-128": "titok_s128",
    "titok-bl-128-vq8k": "titok_bl128_vq8k",
    "titok-bl-128-vae-c16": "titok_bl128_vae_c16",
    "dit-xl-2-256": "dit_xl_2",
    "dit-xl-2-512": "dit_xl_2_512",
    "dit-xl-2-256-diffusers": "diffusers_dit_xl_2_256",
    "sit-xl-2-256": "sit_xl_2",
    "sit-xl-2-mg-256": "sit_xl_2_mg",
    "repa-sit-xl-2-256": "repa_sit_xl_2",
    "lightningdit-xl-1-256": "lightningdit_xl_1",
    "lightningdit-xl-1-256-64ep": "lightningdit_xl_1",
    "maskgit-titok-b-64": "maskgit_bert_titok_b64",
    "halton-maskgit-s-256": "halton_small_256",
    "halton-maskgit-b-256": "halton_base_256",
    "halton-maskgit-l-384": "halton_large_384",
    "mage-b-256": "mage_vit_b",
    "mage-l-256": "mage_vit_l",
    "rar-b-256": "rar_b",
    "rar-l-256": "rar_l",
    "rar-xl-256": "rar_xl",
    "rar-xxl-256": "rar_xxl",
} | {f"llamagen-c2i-{size}-{side}": f"llamagen_gpt_{size}_c2i_{side}" for size in ("b", "l", "xl", "xxl", "3b") for side in (256, 384)}
"""Presets whose official checkpoints' tensors are recorded."""
NOT_RECORDED = {
    "titok-bl-64-vq8k",  # as bl-128 but for the number of tokens
    "titok-bl-64-vae-c16",
    "maskgit-titok-l-32",  # as b-64 but for the number of tokens
    "maskgit-titok-s-128",  # UViTBert, of which a small model is recorded
    "halton-maskgit-t-256",
    "halton-maskgit-s-384",
    "halton-maskgit-b-384",
}
"""Presets that differ from recorded ones in their sizes."""
NETWORK_CALLS = {
    "dit-xl-2-256": 500,
    "dit-xl-2-512": 500,
    "dit-xl-2-256-diffusers": 100,
    "sit-xl-2-256": 500,
    "sit-xl-2-mg-256": 250,
    "maskgit-titok-l-32": 15,
    "maskgit-titok-b-64": 15,
    "maskgit-titok-s-128": 127,
    "mage-b-256": 20,
    "mage-l-256": 20,
}
NETWORK_CALLS |= {f"halton-maskgit-{size}": 64 for size in ("t-256", "s-256", "b-256", "s-384", "b-384", "l-384")}
NETWORK_CALLS |= {f"rar-{size}-256": 511 for size in ("b", "l", "xl", "xxl")}
"""Of one image under the published protocol, where that is told in whole."""
UNGUIDED = {"sit-xl-2-mg-256", "mage-b-256", "mage-l-256"}
"""Guidance is trained into the first; the others know no classes."""


@cache
def network(name: str) -> torch.nn.Module:
    """Of a preset, without memory for its weights."""
    preset = PRESETS[name]
    with torch.device("meta"):
        return FAMILIES[preset.family]({}, preset.config)[0]


def test_presets_that_are_not_recorded_are_known():
    assert PRESETS.keys() - RECORDED.keys() == NOT_RECORDED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_that_it_says(name):
    preset = PRESETS[name]
    module = network(name)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(preset.million_parameters, abs=0.06)
    if preset.component == "generator":
        assert module.num_classes == (1 if preset.family == "mage" else len(imagenet_label_names())) and len(imagenet_label_names()) == 1000
    else:
        assert module.spec.image_size == preset.image_size


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.component == "generator"])
def test_a_generator_makes_what_its_tokenizers_read(name):
    preset, module = PRESETS[name], network(name)
    if not preset.tokenizer:
        assert preset.family == "lightningdit" and module.code_shape[-1] * 16 == preset.image_size  # VA-VAE must be brought
    for tokenizer in preset.tokenizer:
        spec = network(tokenizer).spec
        assert PRESETS[tokenizer].component == "tokenizer"
        assert tuple(module.code_shape) == spec.code_shape(preset.image_size)
        assert module.config.get("codebook_size") == spec.codebook_size
        assert module.image_size(spec.downsample, spec.image_size) == preset.image_size


@pytest.mark.parametrize("name", RECORDED)
def test_a_preset_fits_its_recorded_checkpoint(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in manifest(RECORDED[name])["tensors"].items()}
        load_official(preset.family, state, preset.config)


@pytest.mark.parametrize("name", RECORDED)
def test_arguments_equal_the_recorded_ones(name):
    recorded = manifest(RECORDED[name]).get("config")
    if recorded is None or ("ddconfig" in PRESETS[name].config and "ddconfig" not in recorded):
        pytest.skip("its arguments are not recorded as such")
    for argument, value in PRESETS[name].config.items():
        if argument == "ddconfig":
            parts = {key: list(part) if isinstance(part, tuple) else part for key, part in value.items()}
            assert all(recorded[argument][key] == part for key, part in parts.items())
            continue
        known = recorded["ch_mult"] if argument.endswith("ch_mult") else recorded[argument]
        assert (list(value) if isinstance(value, tuple) else value) == known


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_protocol_is_one_of_the_sampler(name):
    preset = PRESETS[name]
    if preset.component == "tokenizer":
        assert preset.sampler == {}
        return
    module = network(name)
    sampler = default_sampler(preset)
    sampler.check(module)
    assert (sampler.guidance.scale > 1) == (name not in UNGUIDED)
    if name in NETWORK_CALLS:
        assert sampler.network_calls(module) == NETWORK_CALLS[name] and f"{NETWORK_CALLS[name]} network calls" in preset.notes


def test_intervals_of_guidance_are_those_of_the_papers():
    """LightningDiT guides from t = 0.125 or 0.1 after the noise on, REPA where its own time, 1 at the noise, is at most 0.7."""
    for name, start in (("lightningdit-xl-1-256", 0.125), ("lightningdit-xl-1-256-64ep", 0.1), ("repa-sit-xl-2-256", 0.3)):
        preset = PRESETS[name]
        module = network(name)
        sampler = default_sampler(preset)
        before = [decides for _, decides in sampler.evaluations(module) if 1 - decides < start - 1e-9]
        assert sampler.network_calls(module) == 2 * len(sampler.evaluations(module)) - len(before)
        assert 0 < len(before) < len(sampler.evaluations(module)) == sampler.config["num_steps"]


def test_lightningdit_takes_the_points_of_time_of_its_shift():
    preset, module = PRESETS["lightningdit-xl-1-256"], network("lightningdit-xl-1-256")
    t = torch.linspace(0, 1, 250, dtype=torch.float64)  # 0 at the noise
    official = 0.3 * t / (1 - 0.7 * t)
    torch.testing.assert_close(1 - torch.tensor(default_sampler(preset).grid(module), dtype=torch.float64), official, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "scale"), [("maskgit-titok-l-32", 4.5), ("maskgit-titok-b-64", 3.0)])
def test_titoks_linear_guidance_is_a_part_of_its_scale_on_top_of_the_class(name, scale):
    """c + w (c - u), where w is the part of the steps that are done times the scale; and c + w (c - u) = u + (1 + w) (c - u)."""
    sampler = default_sampler(PRESETS[name])
    assert sampler.guidance.scales(8) == pytest.approx([1 + scale * step / 8 for step in range(8)])


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UserError, match=r"llamagen-c2i-l-265.*did you mean 'llamagen-c2i-l-256'"):
        find_preset("llamagen-c2i-l-265")
    with pytest.raises(UserError, match="known are llamagen-vq16, "):
        find_preset("zzz")


def test_the_table_has_a_row_for_each():
    head, *rows = format_presets().splitlines()
    assert head.split() == ["name", "file", "pixels", "parameters", "published"]
    assert [row.split()[0] for row in rows] == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_one_in_full_shows_how_to_import_it(name):
    shown = format_preset(name)
    assert f"genvision import {name} {PRESETS[name].file} --out DIR" in shown
    assert all(f" {tokenizer}" in shown for tokenizer in PRESETS[name].tokenizer)
    assert PRESETS[name].source in shown
