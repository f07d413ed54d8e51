"""A training that begins with trained weights, with parts of them, or with adapters: through `genvision train`, as people type it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_examples import Runs

from genvision.cli import main
from genvision.pipeline import ImagePipeline

LOOP = {"num_steps": 3, "batch_size": 8, "ema_decays": [], "checkpoint_every": 2, "preview_every": 0}
FLOW = {
    "stage": "generator",
    "seed": 5,
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "num_workers": 0},
    "model": {"name": "dit", "hidden_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "path": "linear", "prediction": "velocity"},
    "optim": {"lr": 0.01},
    "sampler": {"num_steps": 2},
    "train": LOOP,
}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


def generator(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/generator/diffusion_pytorch_model.safetensors")


def test_a_run_begins_where_another_ended_and_says_so_once(train, capsys):
    first = train("first", FLOW)
    capsys.readouterr()
    second = train("second", FLOW, "--init_from", first, "--optim.lr", 0.0)
    assert f"init_from {first} (generator): " in capsys.readouterr().err
    assert all(torch.equal(tensor, generator(second)[name]) for name, tensor in generator(first).items())
    (first / "model").rename(first / "moved")  # a run that goes on needs it no more
    main(train.words("second", FLOW, "--init_from", first, "--optim.lr", 0.0, "--train.num_steps", 5))
    assert "init_from" not in capsys.readouterr().err


def test_images_of_another_size_and_parts_that_are_trained(train):
    first = train("first", FLOW)
    data = FLOW["data"] | {"image_size": 16}
    tuned = train("tuned", FLOW | {"data": data}, "--init_from", first, "--optim.train_only", "[attention]")
    changed = {name for name, tensor in generator(tuned).items() if not torch.equal(tensor, generator(first)[name])}
    assert changed and all(".attn" in name or "attention" in name for name in changed)
    assert ImagePipeline.from_pretrained(tuned / "model")(class_labels=[3], seed=0, output_type="np").images.shape == (1, 16, 16, 3)


def test_adapters_are_trained_go_on_bit_for_bit_and_end_merged_in_a_plain_model(train):
    first = train("first", FLOW)
    options = ["--init_from", first, "--lora.rank", 2, "--lora.dropout", 0.1]
    whole = train("whole", FLOW, *options)
    train("stopped", FLOW, *options, "--train.num_steps", 2)
    stopped = train("stopped", FLOW, *options)
    plain, tuned = generator(first), generator(whole)
    assert plain.keys() == tuned.keys()
    assert all(torch.equal(tensor, generator(stopped)[name]) for name, tensor in tuned.items())
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed and all(name.endswith(".weight") and "blocks." in name for name in changed)
    assert {path.name for path in (whole / "model/adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(whole / "checkpoints/step_00000003/optimizer.safetensors")
    assert all("lora_" in name for name in saved)
    main(["sample", "--model", str(whole / "model"), "--num", "2", "--out", str(train.folder / "samples")])


def test_what_is_new_and_not_trained_is_named_with_the_mend(train, capsys):
    first = train("first", FLOW)
    loop = {"train": LOOP | {"num_steps": 1}}
    other = FLOW | loop | {"model": FLOW["model"] | {"num_classes": 12}}  # classes 10 and 11 are new
    warning = "warning: new here, but neither in init_from nor trained, so it stays random: label_embed.table.weight (new rows)"

    def warnings(name: str, config: dict, *more: object) -> list[str]:
        capsys.readouterr()
        train(name, config, "--init_from", first, *more)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: new")]

    assert warnings("adapters", other, "--lora.rank", 2) == [f"{warning}; to train it, name it in lora.also_train"]
    assert warnings("parts", other, "--optim.train_only", "[attention]") == [f"{warning}; to train it, name it in optim.train_only"]
    assert not warnings("both", other, "--lora.rank", 2, "--lora.also_train", "[label_embed]")
    assert not warnings("whole", other) and not warnings("same", FLOW | loop, "--lora.rank", 2)


def test_what_does_not_fit_is_refused(train, tiny_tokenizer):
    first = train("first", FLOW)
    assert "hidden_dim" in train.refused(FLOW, "--init_from", first, "--model.hidden_dim", 32)
    assert "nothing" in train.refused(FLOW, "--init_from", train.folder / "nothing")
    assert "lora.also_train" in train.refused(FLOW, "--lora.rank", 2, "--optim.train_only", "[norms]")
    assert "lora.rank is 0" in train.refused(FLOW, "--lora.alpha", 2.0)
