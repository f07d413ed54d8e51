"""The commands of the pages in docs are run as they stand there, on a tiny folder of photographs or on digits, with tiny models."""

import re
import shlex
import shutil
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genvision.cli import COMMANDS, main
from genvision.config import MODELS, recipe_path
from genvision.convert import load_official
from genvision.jobs.quantize_report import GRADES
from genvision.layers.packed_storage import DESCRIPTION, TENSORS
from genvision.models.dit import DiT
from genvision.models.mage import MAGE
from genvision.models.maskgit import MaskGIT
from genvision.models.rar import RAR
from genvision.objectives.diffusion import DiffusionLossConfig
from genvision.objectives.flow import FlowLossConfig
from genvision.objectives.mask_schedules import check_schedule
from genvision.objectives.masked import MaskedLossConfig
from genvision.objectives.model_guidance import ModelGuidanceConfig
from genvision.objectives.permuted import PermutedLossConfig
from genvision.presets import PRESETS
from genvision.presets_diffusion import DIFFUSION_PRESETS
from genvision.presets_masked import MASKED_PRESETS
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.diffusion import DiffusionSampler
from genvision.samplers.diffusion import Method as DiffusionMethod
from genvision.samplers.flow import FlowSampler
from genvision.samplers.flow import Method as FlowMethod
from genvision.samplers.masked import MaskedSampler
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.quantizers import QUANTIZERS
from genvision.training.config import DataConfig
from parity_fixtures import Fixture

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "tokenizers.md").read_text()
DIFFUSION = (DOCS / "diffusion.md").read_text()
MASKED = (DOCS / "masked.md").read_text()
REPRESENTATION = (DOCS / "representation.md").read_text()
QUANTIZATION = (DOCS / "quantization.md").read_text()
TINY = {
    "vq/vq_folder64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.base_channels 8 --data.num_workers 0",
    "vitok/vitok_cifar10.yaml": "--train.num_steps 2 --train.batch_size 4 --model.encoder_depth 1 --data.num_workers 0",
    "dit/dit_s2_64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.depth 1 --sampler.num_steps 2 --data.num_workers 0",
    "vq/vq_digits.yaml": "--train.num_steps 2 --train.batch_size 8 --model.base_channels 8",
    "maskgit/maskgit_digits.yaml": "--train.num_steps 2 --train.batch_size 8 --model.depth 1 --sampler.num_steps 4",
    "maskgit/magnets_digits.yaml": "--train.num_steps 2 --train.batch_size 8 --model.depth 1",
    "mage/mage_digits.yaml": "--train.num_steps 2 --train.batch_size 8 --model.depth 1 --model.decoder_depth 1",
    "llamagen/llamagen_digits_ternary.yaml": "--train.num_steps 2 --train.batch_size 8 --model.depth 1 --ternary.warmup_steps 1",
    "quantize": "--num 8",
    "--distill-steps": "--distill-steps 2 --distill-images 8",
    "probe": "--num-train 200 --num-test 40 --workers 0 --mage-epochs 2",
    "runs/probe": "--probe knn",
    "--labels-per-class": "--probe knn",
    "finetune": "--epochs 1 --warmup-epochs 0 --batch-size 256 --workers 0",
}
"""What makes recipes and commands small enough for a test."""
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


def test_the_commands_and_the_code_for_masked_generators_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    white = np.zeros((8, 8), dtype=np.uint8)
    white[2:6, 4:] = 255
    Image.fromarray(white).save("mask.png")
    commands = run_all(MASKED)
    assert commands == ["train", "encode", "train", *["sample"] * 5, "train", "sample", "train", "sample"]
    for name in ("halton", "confident", "completed", "edited", "magnets", "mage"):
        with Image.open(tmp_path / f"runs/{name}.png") as grid:
            assert min(grid.size) > 4 * 8
    assert len(list(Path("runs/threes").glob("*.png"))) == 4
    assert re.search(r"4 network calls, [\d.e-]+ GFLOPs an image", capsys.readouterr().err)
    exec(code(MASKED, "python"), {})
    assert capsys.readouterr().out.strip() == "[4, 4] True"


def test_the_commands_and_the_code_for_representations_run(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "runs/model")
    assert run_all(REPRESENTATION) == [*["probe"] * 4, "finetune"]
    capsys.readouterr()
    exec(code(REPRESENTATION, "python"), {})
    assert capsys.readouterr().out.strip() in [str(digit) for digit in range(10)]


def test_the_commands_and_the_code_for_rounded_weights_run(tiny_model, tiny_tokenizer, tiny_codes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "runs/model")
    shutil.copytree(tiny_tokenizer, "runs/vq_digits/model")
    shutil.copytree(tiny_codes, "runs/codes_digits")
    assert run_all(QUANTIZATION) == ["quantize", "sample", "quantize", "sample", "train", "quantize"]
    assert {"int8.png", "ternary.png", "trained_ternary"} <= {path.name for path in Path("runs").iterdir()}
    capsys.readouterr()
    exec(code(QUANTIZATION, "python"), {})
    assert capsys.readouterr().out.strip() == "4 float32"


def test_the_page_on_rounded_weights_names_grades_and_files_that_there_are():
    assert [bound for bound, _ in GRADES][:3] == [0.001, 0.01, 0.1] and "below 0.001, 0.01 and 0.1" in QUANTIZATION
    assert all(name in QUANTIZATION.lower() for _, name in GRADES)
    for file in re.findall(r"`(genvision/[\w/]+\.py)`", QUANTIZATION):
        assert (DOCS.parent / file).is_file()
    assert f"`{TENSORS}`" in QUANTIZATION and f"`{DESCRIPTION}`" in QUANTIZATION
    for option in set(re.findall(r"`--([a-z-]+)", QUANTIZATION)) - {"dtype"}:
        assert option.replace("-", "_") in signature(COMMANDS["quantize"]).parameters, option


@pytest.mark.parametrize(
    ("column", "family", "fixture"),
    [
        ("MaskGIT", "maskgit-jax", "maskgit_jax"),
        ("ImageBert", "maskgit-bert", "maskgit_bert"),
        ("UViTBert", "maskgit-bert", "maskgit_uvit"),
        ("Halton-MaskGIT", "halton-maskgit", "halton_maskgit"),
    ],
)
def test_the_switches_on_the_page_are_those_of_imported_models(column, family, fixture):
    recorded = Fixture(fixture)
    config = load_official(family, recorded.state, recorded.config).config
    rows = [row.strip(" |").split(" | ") for row in MASKED.partition("| switch |")[2].partition("\n\n")[0].splitlines()]
    place = next(i for i, name in enumerate(rows[0], start=1) if name.split(" (")[0] == column)
    switches = {row[0].strip("`"): row[place] for row in rows[2:] if row[0].startswith("`")}
    assert len(switches) == 8
    for name, value in switches.items():
        assert config[name] == type(config[name])(yaml.safe_load(value)), name


def test_the_losses_and_schedules_on_the_page_are_possible():
    table = MASKED.partition("| original | masks |")[2].partition("\n\n")[0]
    losses = [yaml.safe_load(text) for text in re.findall(r"`(\{.*\})`", table)]
    assert len(losses) == 4
    for loss in losses:
        MaskedLossConfig(**loss)
    schedules = MASKED.partition("| gamma |")[2].partition("\n\n")[0]
    for name in re.findall(r"`([\w<>]+)`", schedules):
        check_schedule(name.replace("<X>", "3"))


def test_the_page_on_masked_generators_counts_network_calls_as_the_samplers_do():
    places = {"codebook_size": 4, "grid_size": 4, "hidden_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 2}
    masked, autoregressive = MaskGIT(**places, mlp_multiple_of=8), RAR(**places)
    rows = [
        row.strip("| ").split(" | ") for row in MASKED.partition("| network calls of an image |")[2].partition("\n\n")[0].splitlines()[2:]
    ]
    for schedules, steps, tokens in rows:
        known = {"T": 5, "2T": 10, "2T - 1": 9, "N": 16, "2N": 32, "2N - 1": 31}
        names = re.findall(r"`([\w-]+)`", schedules)
        for options in [{"guidance_scale": 3.0, "guidance_schedule": name} for name in names] or [{}]:
            assert MaskedSampler(num_steps=5, **options).network_calls(masked) == known[steps.split(":")[0]]
            assert AutoregressiveSampler(**options).network_calls(autoregressive) == known[tokens.split(" |")[0]]


def test_what_the_page_on_masked_generators_names_exists():
    for recipe in re.findall(r"`(\w+/\w+\.yaml)`", MASKED):
        assert recipe_path(recipe).is_file()
    assert set(re.findall(r"`((?:maskgit-titok|halton-maskgit|mage-[bl]|rar)-[\w-]+)`", MASKED)) == set(MASKED_PRESETS)
    for file in re.findall(r"`((?:genvision|samplers|tests)/[\w/]+\.py)`", MASKED):
        assert (DOCS.parent / file).is_file()
    known = {"loss": names(MaskedLossConfig) | names(PermutedLossConfig), "data": names(DataConfig)}
    known["model"] = {*signature(MaskGIT).parameters, *signature(MAGE).parameters}
    for section, key in re.findall(r"`(loss|data|model)\.(\w+)[:`]", MASKED):
        assert key in known[section], f"{section}.{key}"
    for page in re.findall(r"\]\((\w+\.md)[#)]", MASKED):
        assert (DOCS / page).is_file()
