"""The commands of docs/tokenizers.md and docs/diffusion.md are run as they stand there, on a tiny folder of photographs."""

import re
import shlex
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from genvision.cli import main
from genvision.config import MODELS, recipe_path
from genvision.models.dit import DiT
from genvision.objectives.diffusion import DiffusionLossConfig
from genvision.objectives.flow import FlowLossConfig
from genvision.objectives.model_guidance import ModelGuidanceConfig
from genvision.presets import PRESETS
from genvision.presets_diffusion import DIFFUSION_PRESETS
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.diffusion import Method as DiffusionMethod
from genvision.samplers.flow import FlowSampler
from genvision.samplers.flow import Method as FlowMethod
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.quantizers import QUANTIZERS
from genvision.training.config import DataConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "tokenizers.md").read_text()
DIFFUSION = (DOCS / "diffusion.md").read_text()
TINY = {
    "vq/vq_folder64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.base_channels 8 --data.num_workers 0",
    "vitok/vitok_cifar10.yaml": "--train.num_steps 2 --train.batch_size 4 --model.encoder_depth 1 --data.num_workers 0",
    "dit/dit_s2_64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.depth 1 --sampler.num_steps 2 --data.num_workers 0",
}
"""What makes the recipes small enough for a test."""
PREDICTED = {"ddpm": "noise", "linear": "velocity"}
PROTOCOLS = {
    "DiT": "dit-xl-2-256",
    "diffusers": "dit-xl-2-256-diffusers",
    "SiT, ODE": "sit-xl-2-256",
    "LightningDiT": "lightningdit-xl-1-256-64ep",
    "REPA": "repa-sit-xl-2-256",
    "Model-guidance": "sit-xl-2-mg-256",
}
"""Rows of the table of published protocols, by how they begin, to the presets that draw so."""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Eight pictures of two classes in the folder `photos` of the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "photos" / ("cat" if i < 4 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)


def code(page: str, language: str) -> str:
    """The first block of this language."""
    block = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert block is not None
    return block[1].strip()


def run_all(page: str) -> list[str]:
    """Run the first block of commands, with recipes made small; returns which commands they were."""
    commands = [shlex.split(line)[1:] for line in code(page, "bash").splitlines()]
    for words in commands:
        small = [word for recipe, changes in TINY.items() if recipe in words for word in shlex.split(changes)]
        main(words + small)
    return [words[0] for words in commands]


def test_the_commands_for_tokenizers_run(photos, tmp_path):
    assert run_all(PAGE) == ["train", "train", "reconstruct", "statistics", "encode", "decode"]
    with Image.open(tmp_path / "runs/latents.png") as grid:
        assert min(grid.size) > 2 * 64
    standardised = load_tokenizer(tmp_path / "runs/vitok_standardised")
    assert len(standardised.config.latent_std) == 16 and min(standardised.config.latent_std) > 0


def test_the_commands_and_the_code_for_diffusion_run(photos, tmp_path, capsys):
    commands = run_all(DIFFUSION)
    assert commands == ["train", "statistics", "encode", "train", "sample", "train", "sample", "export"]
    for name in ("runs/dit.png", "runs/autoguided.png"):
        with Image.open(tmp_path / name) as grid:
            assert min(grid.size) > 4 * 64
    state = torch.load(tmp_path / "runs/dit_s2_64.pt", weights_only=True)
    assert "x_embedder.proj.weight" in state and "pos_embed" in state
    capsys.readouterr()
    exec(code(DIFFUSION, "python"), {})
    assert capsys.readouterr().out.strip() == "tensor([4, 4])"  # two steps, guided


def test_the_page_on_diffusion_counts_network_calls_as_the_samplers_do():
    table = DIFFUSION.partition("| `--method` |")[2].partition("\n\n")[0]
    counted = {name: row.split("|")[3].strip() for row in table.splitlines()[2:] for name in re.findall(r"`([\w+-]+)`", row.split("|")[1])}
    assert set(counted) == {*get_args(DiffusionMethod), *get_args(FlowMethod)}
    generators = {
        path: DiT(input_size=2, hidden_dim=16, depth=1, num_heads=2, path=path, prediction=kind) for path, kind in PREDICTED.items()
    }
    for name, formula in counted.items():
        kind, path = (DiffusionSampler, "ddpm") if name in get_args(DiffusionMethod) else (FlowSampler, "linear")
        calls = kind(method=name, num_steps=10).network_calls(generators[path])
        known = {"num_steps": 10, "2 num_steps": 20, "2 num_steps - 1": 19, "differs by image": None}
        assert calls == known[formula], name


def test_the_protocols_on_the_page_are_those_of_the_presets():
    table = DIFFUSION.partition("| published | here |")[2].partition("\n\n")[0]
    for system, preset in PROTOCOLS.items():
        row = next(row for row in table.splitlines() if row.startswith(f"| {system}"))
        options = PRESETS[preset].sampler
        assert f"`{options['method']}`" in row
        assert re.search(rf"\b{options['num_steps']}\b", row)
        assert f"guidance {options['guidance_scale']:g}" in row if "guidance_scale" in options else "without guidance" in row
        assert ("on 3 channels" in row) == ("guidance_channels" in options)
        start = options.get("guidance_start", 0)
        assert not start or f"[{start:g}, 1]" in row or f"from {start:g} on" in row


def test_what_the_page_on_diffusion_names_exists():
    for recipe in re.findall(r"`(\w+/\w+\.yaml)`", DIFFUSION):
        assert recipe_path(recipe).is_file()
    named = set(re.findall(r"`((?:dit|sit|repa-sit|lightningdit)-xl-[\w-]+)`", DIFFUSION))
    assert named == set(DIFFUSION_PRESETS)
    for file in re.findall(r"`(genvision/[\w/]+\.py)`", DIFFUSION):
        assert (DOCS.parent / file).is_file()
    known = {"loss": {*names(DiffusionLossConfig), *names(FlowLossConfig)}, "loss.guidance": names(ModelGuidanceConfig)}
    known |= {"data": names(DataConfig), "model": set(signature(DiT).parameters)}
    for section, key in re.findall(r"`(loss\.guidance|loss|data|model)\.(\w+)[:`]", DIFFUSION):
        assert key in known[section], f"{section}.{key}"


def names(options: type) -> set[str]:
    return {field.name for field in fields(options)}


def test_what_the_page_names_exists():
    for recipe in re.findall(r"`(\w+/\w+\.yaml)`", PAGE):
        assert recipe_path(recipe).is_file()
    table = PAGE.partition("## Which there are")[2].partition("## Training one")[0]
    assert {name for name in MODELS if MODELS[name][0] == "tokenizer"} == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    for name in re.findall(r"`((?:llamagen|vqgan|maskgit|mage|sd|titok)-[\w*-]+)`", table):
        assert name in PRESETS or any(preset.startswith(name.rstrip("*")) for preset in PRESETS if name.endswith("*")), name
    quantizers = PAGE.partition("**Quantisers.**")[2].partition("## ")[0]
    assert set(QUANTIZERS) == set(
        re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in quantizers.splitlines() if line.startswith("| `")))
    )
