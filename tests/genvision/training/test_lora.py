import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MODELS, output, tiny, train_step

from genvision.errors import UserError
from genvision.training.lora import LoRAConfig, adapter_state_dict, add_lora, merge_lora, merged_state_dict, save_adapter

TRANSFORMERS = sorted(set(MODELS) - {"vq"})
LAYERS = {
    "llamagen": {"attention.qkv", "attention.proj", "mlp.gate", "mlp.up", "mlp.down"},
    "rar": {"attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"},
    "maskgit": {"attn.qkv", "attn.proj", "mlp.gate", "mlp.up", "mlp.down"},
    "dit": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
}
"""Of each block; what makes modulations is not among them."""


def adapted(name, steps=1, **options):
    """A model with adapters that were trained for some steps."""
    model = tiny(name)
    add_lora(model, LoRAConfig(**{"rank": 2, **options}))
    for _ in range(steps):
        train_step(model)
        model.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_begins_as_it_was_and_only_its_adapters_are_trained(name):
    plain, model = tiny(name).eval(), tiny(name)
    layers = add_lora(model, LoRAConfig(rank=2))
    torch.testing.assert_close(output(model.eval()), output(plain), rtol=1e-5, atol=1e-5)  # rounding, in kl
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_step(model), train_step(model)  # A moves when B is no longer zero
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key])}
    assert changed == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    if name in LAYERS:
        assert set(layers) == {f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS[name]}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_merged_weights_are_those_of_a_plain_model_that_does_the_same(name):
    model, plain = adapted(name, steps=2), tiny(name, seed=5).eval()
    start, wanted = tiny(name).eval(), output(model)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(output(plain), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - output(start)).abs().max() > 1e-3
    merge_lora(model)
    assert {key: tensor.tolist() for key, tensor in model.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in plain.state_dict().items()
    }


def test_an_average_of_a_model_is_merged_too():
    model = adapted("dit")
    average = {key: 0.5 * tensor for key, tensor in model.state_dict().items()}
    merged, name = merged_state_dict(model, average), "blocks.0.attn.qkv"
    a, b = (average[f"{name}.lora_{part}.default.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], average[f"{name}.base_layer.weight"] + b @ a)
    assert merged[f"{name}.bias"] is average[f"{name}.base_layer.bias"]


def test_alpha_scales_what_an_adapter_adds():
    models = [tiny("dit"), tiny("dit")]
    for model, alpha in zip(models, (None, 6.0), strict=True):
        add_lora(model, LoRAConfig(rank=2, alpha=alpha))
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                torch.nn.init.constant_(parameter, 0.1)
    name, own = "blocks.0.attn.qkv.weight", tiny("dit").blocks[0].attn.qkv.weight
    one, three = (merged_state_dict(model)[name] - own for model in models)
    torch.testing.assert_close(one, torch.full_like(one, 2 * 0.1 * 0.1))
    torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("name", ["maskgit", "mage"])
def test_nested_networks_have_their_part_of_the_adapters(name):
    model, plain = adapted(name, steps=2), tiny(name).eval()
    codes, labels = torch.randint(17, (2, 16)), torch.tensor([0, 3])
    before = plain(codes, labels, nesting=2)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(model(codes, labels, nesting=2), plain(codes, labels, nesting=2), rtol=1e-4, atol=1e-5)
    assert (plain(codes, labels, nesting=2) - before).abs().max() > 1e-3
    model(codes, labels, nesting=2).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "also_train"),
    [("dit", ()), ("dit", ("label_embed",)), ("maskgit", ("blocks.*.norm?.*", "label_embed")), ("mage", ("words", "norm")), ("titok", ())],
)
def test_peft_loads_what_is_saved(name, also_train, tmp_path):
    model = adapted(name, steps=2, also_train=also_train, alpha=3.0)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval().base_model.model
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() >= {f"base_model.model.{key}" for key in adapter_state_dict(model)}
    assert sum(tensor.numel() for tensor in tensors.values()) < 0.7 * sum(p.numel() for p in tiny(name).parameters())
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["peft_type"], facts["r"], facts["lora_alpha"]) == ("LORA", 2, 3.0)


def test_targets_are_ends_of_names_or_patterns():
    ends = add_lora(tiny("dit"), LoRAConfig(rank=2, targets=("qkv", "mlp.fc1")))
    assert set(ends) == {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.fc1")}
    assert set(add_lora(tiny("dit"), LoRAConfig(rank=2, targets=("blocks.1.*",)))) == {
        f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "modulation")
    }


def test_parts_may_be_trained_whole_beside_the_adapters(tmp_path):
    model = tiny("rar")
    add_lora(model, LoRAConfig(rank=2, also_train=("label_embed", "*position_table")))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_step(model)
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key]) and ".lora_" not in key}
    assert changed == {"label_embed.table.weight", "position_table", "next_position_table"}
    with pytest.raises(UserError, match="peft's format cannot hold next_position_table, as no layer holds it alone"):
        save_adapter(model, tmp_path)
    model = tiny("maskgit")
    add_lora(model, LoRAConfig(rank=2, also_train=("norm.bias",)))  # beside a layer norm.norm, which peft would take for norm
    with pytest.raises(UserError, match=r"peft's format cannot hold norm\.bias"):
        save_adapter(model, tmp_path)


def test_an_adapted_layer_compiles_without_a_break():
    model = adapted("maskgit", steps=2)
    block = torch.compile(model.blocks[0], backend="eager", fullgraph=True)
    x, condition = torch.randn(1, 16, 16), torch.randn(1, 16)
    torch.testing.assert_close(block(x, condition), model.blocks[0](x, condition))


def test_what_cannot_be_adapted_is_named(monkeypatch):
    with pytest.raises(
        UserError, match=r"lora\.rank 2: VQTokenizer has no linear layers in its blocks; train parts of it by optim\.train_only"
    ):
        add_lora(tiny("vq"), LoRAConfig(rank=2))
    with pytest.raises(
        UserError, match=r"lora\.targets to_q: no linear layer has a name that ends so; the ends here are fc1, fc2, qkv, proj"
    ):
        add_lora(tiny("dit"), LoRAConfig(rank=2, targets=("to_q",)))
    with pytest.raises(UserError, match=r"lora\.also_train labels: the model has no part of that name"):
        add_lora(tiny("dit"), LoRAConfig(rank=2, also_train=("labels",)))
    with pytest.raises(UserError, match=r"lora\.also_train: blocks\.0\.attn\.proj\.bias is in a layer with an adapter"):
        add_lora(tiny("dit"), LoRAConfig(rank=2, also_train=("attention",)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora\.rank 2: peft is not installed; pip install genvision\[lora\]"):
        add_lora(tiny("dit"), LoRAConfig(rank=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=-1), r"lora\.rank must be at least 0, got -1"),
        (dict(rank=2, alpha=0.0), r"lora\.alpha must be above 0, got 0\.0"),
        (dict(rank=2, dropout=1.0), r"lora\.dropout must be at least 0 and below 1, got 1\.0"),
        (dict(targets=["qkv"]), r"lora\.rank is 0, so there are no adapters for the other options of lora"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**options)
