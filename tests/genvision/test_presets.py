"""Published models by name agree with the recorded lists of their tensors."""

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
} | {f"llamagen-c2i-{size}-{side}": f"llamagen_gpt_{size}_c2i_{side}" for size in ("b", "l", "xl", "xxl", "3b") for side in (256, 384)}
"""Presets whose official checkpoints' tensors are recorded."""
NETWORK_CALLS = {
    "dit-xl-2-256": 500,
    "dit-xl-2-512": 500,
    "dit-xl-2-256-diffusers": 100,
    "sit-xl-2-256": 500,
    "sit-xl-2-mg-256": 250,
}
"""Of one image under the published protocol, where that is told in whole."""


def test_only_two_presets_are_not_recorded():
    assert PRESETS.keys() - RECORDED.keys() == {"titok-bl-64-vq8k", "titok-bl-64-vae-c16"}  # as bl-128 but for the number of tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_that_it_says(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        module, _ = FAMILIES[preset.family]({}, preset.config)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(preset.million_parameters, abs=0.06)
    if preset.component == "generator":
        assert module.code_shape[-1] * (8 if module.code_shape[0] == 4 else 16) == preset.image_size
        assert module.num_classes == len(imagenet_label_names()) == 1000
    else:
        assert module.spec.image_size == preset.image_size


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
    with torch.device("meta"):
        module, _ = FAMILIES[preset.family]({}, preset.config)
    sampler = default_sampler(preset)
    sampler.check(module)
    assert (sampler.guidance.scale > 1) == (name != "sit-xl-2-mg-256")
    if name in NETWORK_CALLS:
        assert sampler.network_calls(module) == NETWORK_CALLS[name] and f"{NETWORK_CALLS[name]} network calls" in preset.notes


def test_intervals_of_guidance_are_those_of_the_papers():
    """LightningDiT guides from t = 0.125 or 0.1 after the noise on, REPA where its own time, 1 at the noise, is at most 0.7."""
    for name, start in (("lightningdit-xl-1-256", 0.125), ("lightningdit-xl-1-256-64ep", 0.1), ("repa-sit-xl-2-256", 0.3)):
        preset = PRESETS[name]
        with torch.device("meta"):
            module, _ = FAMILIES[preset.family]({}, preset.config)
        sampler = default_sampler(preset)
        before = [decides for _, decides in sampler.evaluations(module) if 1 - decides < start - 1e-9]
        assert sampler.network_calls(module) == 2 * len(sampler.evaluations(module)) - len(before)
        assert 0 < len(before) < len(sampler.evaluations(module)) == sampler.config["num_steps"]


def test_lightningdit_takes_the_points_of_time_of_its_shift():
    preset = PRESETS["lightningdit-xl-1-256"]
    with torch.device("meta"):
        module, _ = FAMILIES[preset.family]({}, preset.config)
    t = torch.linspace(0, 1, 250, dtype=torch.float64)  # 0 at the noise
    official = 0.3 * t / (1 - 0.7 * t)
    torch.testing.assert_close(1 - torch.tensor(default_sampler(preset).grid(module), dtype=torch.float64), official, atol=1e-12, rtol=0)


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
    assert PRESETS[name].source in shown
