"""A checkpoint of another family is told by its tensors' names."""

import pytest
import torch

from genvision.convert import FAMILIES, load_official
from genvision.convert.signatures import guess_family
from genvision.errors import UserError
from parity_fixtures import Fixture, manifest

EXAMPLES = {
    "llamagen-gpt": "llamagen_gpt_b_c2i_256",
    "llamagen-vq": "llamagen_vq16",
    "taming-vqgan": "taming_vqgan_imagenet_f16_1024",
    "maskgit-vqgan": "maskgit_vqgan",
    "mage-vqgan": "mage_vqgan",
    "autoencoder-kl": "sd_vae_kl_f8_compvis",
    "titok": "titok_l32",
    "vitok": "vitok_sb_1x16",
    "dit": "dit_b_4",
    "sit": "sit_xl_2",
    "lightningdit": "lightningdit_xl_1",
    "repa-sit": "repa_sit_xl_2",
    "diffusers-dit": "diffusers_dit_xl_2_256",
    "mage": "mage_vit_b",
    "rar": "rar_b",
    "halton-maskgit": "halton_base_256",
    "maskgit-bert": "maskgit_bert_titok_b64",
}
TINY_EXAMPLES = {"maskgit-jax": "maskgit_jax"}
"""Of which only a small model is recorded."""
SHARED = {"dit": "dit or sit", "sit": "dit or sit"}
"""Families whose names are the same."""


def test_every_family_has_an_example():
    assert EXAMPLES.keys() | TINY_EXAMPLES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", EXAMPLES)
def test_a_family_is_known_by_its_names(family):
    assert guess_family(manifest(EXAMPLES[family])["tensors"]) == SHARED.get(family, family)


@pytest.mark.parametrize("family", TINY_EXAMPLES)
def test_a_family_is_known_by_the_names_of_a_small_model(family):
    assert guess_family(Fixture(TINY_EXAMPLES[family]).state) == family


def test_layouts_of_one_family_are_known_too():
    assert guess_family(Fixture("maskgit_uvit").state) == "maskgit-bert"
    assert guess_family(manifest("diffusers_autoencoderkl_sd_vae_ft_ema")["tensors"]) == "autoencoder-kl"
    assert guess_family(f"first_stage_model.{name}" for name in manifest("sd_vae_kl_f8_compvis")["tensors"]) == "autoencoder-kl"
    assert guess_family(manifest("titok_bl128_vae_c16")["tensors"]) == "titok"
    assert guess_family(manifest("taming_vqgan_imagenet_f16_16384")["tensors"]) == "taming-vqgan"
    assert guess_family(manifest("sit_xl_2_mg")["tensors"]) == "dit or sit"
    assert guess_family(f"module.{name}" for name in manifest("lightningdit_xl_1")["tensors"]) == "lightningdit"


def test_strange_names_are_no_family():
    assert guess_family(["weight", "bias"]) is None and guess_family([]) is None


def test_the_error_names_the_family_that_it_is():
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in manifest("vitok_sb_1x16")["tensors"].items()}
        with pytest.raises(UserError, match=r"file\.pt: looks like a checkpoint of vitok, not of maskgit-vqgan"):
            load_official("maskgit-vqgan", state, {}, source="file.pt")
