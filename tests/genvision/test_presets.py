"""Published models by name agree with the recorded lists of their tensors."""

import pytest
import torch

from genvision.convert import FAMILIES, load_official
from genvision.errors import UserError
from genvision.jobs.import_official import imagenet_label_names
from genvision.presets import PRESETS, find_preset, format_preset, format_presets
from genvision.samplers.autoregressive import AutoregressiveSampler
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
} | {f"llamagen-c2i-{size}-{side}": f"llamagen_gpt_{size}_c2i_{side}" for size in ("b", "l", "xl", "xxl", "3b") for side in (256, 384)}
"""Presets whose official checkpoints' tensors are recorded."""


def test_only_two_presets_are_not_recorded():
    assert PRESETS.keys() - RECORDED.keys() == {"titok-bl-64-vq8k", "titok-bl-64-vae-c16"}  # as bl-128 but for the number of tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_that_it_says(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        module, _ = FAMILIES[preset.family]({}, preset.config)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(preset.million_parameters, abs=0.06)
    if preset.component == "generator":
        assert module.grid_size * 16 == preset.image_size
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
    if preset.component == "generator":
        assert AutoregressiveSampler(**preset.sampler).guidance.scale > 1
    else:
        assert preset.sampler == {}


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
