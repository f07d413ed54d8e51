"""Packed ternary models in a folder: they come back as they were, and damage is named in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import output, tiny

from genvision.errors import UserError
from genvision.layers.packed_storage import DESCRIPTION, TENSORS, packed_layers, save_packed, tensor_bytes
from genvision.layers.ternarize import ternarize_linears
from genvision.models.base import GENERATORS
from genvision.tokenizers.base import content_hash, load_component

FAMILIES = ["llamagen", "rar", "maskgit", "mage", "dit"]


def packed(name, **options):
    model = tiny(name).eval()
    ternarize_linears(model, **options)
    return model


@pytest.fixture
def folder(tmp_path):
    save_packed(packed("llamagen"), tmp_path, measure="mean")
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_model_comes_back_as_it_was(name, tmp_path):
    model = packed(name, per_row=name != "rar", packing="base3" if name == "mage" else "2bit")
    save_packed(model, tmp_path / "generator")
    loaded = load_component(tmp_path / "generator", GENERATORS, "generator")
    assert not loaded.training and packed_layers(loaded).keys() == packed_layers(model).keys()
    assert content_hash(loaded) == content_hash(model) != content_hash(tiny(name))
    with torch.inference_mode():
        assert output(loaded).equal(output(model))


def test_the_file_holds_two_bits_a_weight_and_floats_for_the_rest(folder):
    model, description = packed("llamagen"), json.loads((folder / DESCRIPTION).read_text())
    assert description["weights"] == "ternary" and description["packing"] == "2bit" and description["measure"] == "mean"
    layers = packed_layers(model)
    assert description["layers"] == list(layers) and "head" not in layers
    state = load_file(folder / TENSORS)
    for name, layer in layers.items():
        assert state[f"{name}.codes"].nbytes == layer.out_features * -(-layer.in_features // 4)
    assert state["head.weight"].dtype == torch.float32
    assert sum(tensor.nbytes for tensor in state.values()) == tensor_bytes(model) < 0.5 * tensor_bytes(tiny("llamagen"))


def test_the_generators_own_loader_finds_no_weights_rather_than_random_ones(folder):
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        type(tiny("llamagen")).from_pretrained(str(folder))


def damage_description(folder, **changes):
    content = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(content | changes))


def damage_tensor(folder, name, tensor):
    state = load_file(folder / TENSORS)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    save_file(state, folder / TENSORS)


CODES = "blocks.0.attention.proj.codes"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "not a description of packed weights"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "not a description of packed weights"),
        (lambda folder: damage_description(folder, packing="4bit"), "packing '4bit' are unknown"),
        (lambda folder: damage_description(folder, layers=[]), "layers must be a list of names"),
        (lambda folder: damage_description(folder, layers=["blocks.9.mlp.up"]), "blocks.9.mlp.up is no linear layer of LlamaGen"),
        (lambda folder: (folder / TENSORS).unlink(), "cannot be loaded"),
        (lambda folder: (folder / TENSORS).write_bytes(b"cut"), "cannot be loaded"),
        (lambda folder: damage_tensor(folder, "norm.weight", None), "norm.weight"),
        (lambda folder: damage_tensor(folder, CODES, torch.zeros(3, 3, dtype=torch.uint8)), "size mismatch"),
        (lambda folder: damage_tensor(folder, CODES, torch.full((16, 4), 255, dtype=torch.uint8)), "no 2bit code makes"),
        (lambda folder: damage_tensor(folder, "head.weight", torch.full((16, 16), torch.nan)), "NaN"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_component(folder, GENERATORS, "generator")
    assert "\n" not in str(error.value)
