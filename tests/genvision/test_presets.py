"""Published models by name agree with the recorded lists of their tensors."""

import pytest

from genvision.errors import UserError
from genvision.presets import PRESETS, find_preset, format_preset, format_presets
from genvision.samplers.autoregressive import AutoregressiveSampler
from parity_fixtures import manifest


def manifest_of(name: str) -> dict:
    """llamagen-c2i-b-256 -> manifest_llamagen_gpt_b_c2i_256.json, vqgan-imagenet-f16-1024 -> manifest_taming_vqgan_..._1024.json."""
    family, *rest = name.split("-")
    if family == "vqgan":
        return manifest("_".join(["taming", family, *rest]))
    return manifest("_".join([family, *(["gpt", rest[1], rest[0], rest[2]] if len(rest) == 3 else rest)]))


@pytest.mark.parametrize("name", PRESETS)
def test_size_equals_the_recorded_one(name):
    assert PRESETS[name].million_parameters == pytest.approx(manifest_of(name)["params"] / 1e6, abs=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_arguments_equal_the_recorded_ones(name):
    recorded = manifest_of(name)["config"]
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
