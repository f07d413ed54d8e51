"""Generators of masked and permuted tokens are imported as pipelines that draw, beside the tokenizer that they were trained with only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from genvision.cli import main
from genvision.errors import UserError
from genvision.jobs.import_official import SAMPLER_OF, import_checkpoint
from genvision.pipeline import ImagePipeline, read_index, save_parts
from genvision.preset import Preset
from genvision.presets import PRESETS
from genvision.tokenizers.base import content_hash
from parity_fixtures import Fixture

COMMON = {"million_parameters": 0.1, "source": "nowhere, table 0"}
STEPS = {"num_steps": 4, "schedule": "arccos", "guidance_scale": 2.0}
CODEBOOK = "quantize.embedding.weight"


def generator(family: str, fixture: str, size: int, tokenizer: str, **sampler: object) -> tuple[Preset, dict[str, torch.Tensor]]:
    recorded = Fixture(fixture)
    facts = {"family": family, "config": recorded.config, "file": f"{fixture}.pt", "image_size": size, "tokenizer": (tokenizer,)}
    return Preset(component="generator", sampler=sampler, **facts, **COMMON), recorded.state


def tokenizer(family: str, fixture: str, side: int, codes: int, **config: object) -> tuple[Preset, dict[str, torch.Tensor]]:
    """Of images of this side, with the first `codes` of the recorded codebook."""
    recorded = Fixture(fixture)
    state = recorded.state | {CODEBOOK: recorded.state[CODEBOOK][:codes]}
    facts = {"family": family, "config": recorded.config | config, "file": f"{fixture}.pt", "image_size": side}
    return Preset(component="tokenizer", **facts, **COMMON), state


def lengthened(state: dict[str, torch.Tensor], old: int, new: int) -> dict[str, torch.Tensor]:
    """Tables of `old` tokens, which are the first axis of some tensors, repeated to `new`."""
    return {name: x[torch.arange(new) % old] if len(x) == old else x for name, x in state.items()}


def models() -> dict[str, tuple[Preset, dict[str, torch.Tensor]]]:
    mage_network = Fixture("mage_vqgan").config["ddconfig"]
    titok, titok_state = tokenizer("titok", "titok", 64, 40)
    titok.config["model"]["vq_model"]["num_latent_tokens"] = 16
    return {
        "tiny-mage": generator("mage", "mage_generate", 16, "tiny-mage-vqgan", num_steps=4, choice_temperature=6.0),
        "tiny-halton": generator("halton-maskgit", "halton_maskgit", 16, "tiny-vqgan", order="halton", **STEPS),
        "tiny-bert": generator("maskgit-bert", "maskgit_bert", 64, "tiny-titok", confidence="logit", **STEPS),
        "tiny-uvit": generator("maskgit-bert", "maskgit_uvit", 64, "tiny-titok", confidence="logit", **STEPS),
        "tiny-rar": generator("rar", "rar", 8, "tiny-vqgan-24", guidance_scale=4.0, guidance_schedule="power-cosine"),
        "tiny-mage-vqgan": tokenizer("mage-vqgan", "mage_vqgan", 16, 40, n_embed=40),
        "tiny-vqgan": tokenizer("maskgit-vqgan", "maskgit_vqgan", 16, 40, num_embeddings=40),
        "tiny-vqgan-24": tokenizer("maskgit-vqgan", "maskgit_vqgan", 8, 24, num_embeddings=24, resolution=8),
        "tiny-mage-vqgan-24": tokenizer("mage-vqgan", "mage_vqgan", 8, 24, n_embed=24, ddconfig=mage_network | {"resolution": 8}),
        "tiny-titok": (titok, lengthened(titok_state, 7, 16)),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, (_, state) in models().items():
        torch.save({"model": state} if name == "tiny-mage" else state, folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in models()}


@pytest.fixture
def add(files, monkeypatch) -> Callable[..., list[str]]:
    """Imports one of the tiny models."""
    monkeypatch.setattr("genvision.presets.PRESETS", PRESETS | {name: preset for name, (preset, _) in models().items()})
    return lambda name, out: import_checkpoint(name, files[name], out)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_family_of_a_published_generator_has_a_sampler():
    assert {preset.family for preset in PRESETS.values() if preset.component == "generator"} == SAMPLER_OF.keys()


PAIRS = {
    "tiny-mage": ("tiny-mage-vqgan", "MaskedSampler", 4),
    "tiny-halton": ("tiny-vqgan", "MaskedSampler", 8),
    "tiny-bert": ("tiny-titok", "MaskedSampler", 8),
    "tiny-uvit": ("tiny-titok", "MaskedSampler", 8),
    "tiny-rar": ("tiny-vqgan-24", "AutoregressiveSampler", 31),
}
"""Generator to its tokenizer, its sampler and the network calls of an image."""


@pytest.mark.parametrize("name", PAIRS)
def test_both_parts_make_a_pipeline_with_the_published_protocol(name, add, tmp_path, capsys):
    beside, sampler, calls = PAIRS[name]
    assert add(name, tmp_path / "model") == ["tokenizer"] and add(beside, tmp_path / "model") == []
    assert capsys.readouterr().err == ""
    pipeline = ImagePipeline.from_pretrained(tmp_path / "model")
    preset = models()[name][0]
    assert type(pipeline.sampler).__name__ == sampler
    assert {key: pipeline.sampler.config[key] for key in preset.sampler} == preset.sampler
    drawn = pipeline([0, 0], output_type="np")
    assert drawn.images.shape == (2, preset.image_size, preset.image_size, 3) and drawn.network_calls.tolist() == [calls, calls]
    assert read_index(tmp_path / "model")["imported"] == {
        "generator": {"preset": name, "tokenizers": [beside], "tokenizer_hash": content_hash(pipeline.tokenizer)},
        "tokenizer": {"preset": beside, "hash": content_hash(pipeline.tokenizer)},
    }


class TestTokenizersOfEqualShapes:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("tiny-mage", "tiny-vqgan"),
            ("tiny-vqgan", "tiny-mage"),
            ("tiny-halton", "tiny-mage-vqgan"),
            ("tiny-mage-vqgan", "tiny-halton"),
            ("tiny-rar", "tiny-mage-vqgan-24"),
        ],
    )
    def test_the_wrong_one_is_refused_in_either_order(self, first, second, add, tmp_path):
        out = tmp_path / "model"
        add(first, out)
        before = contents(out)
        with pytest.raises(UserError) as caught:
            add(second, out)
        name, right, wrong = (first, PAIRS[first][0], second) if first in PAIRS else (second, PAIRS[second][0], first)
        assert f"{name} was trained on the codes of {right}, not on those of {wrong}" in str(caught.value)
        assert "\n" not in str(caught.value) and contents(out) == before

    def test_the_command_line_says_so_without_a_traceback(self, add, files, tmp_path, capsys):
        add("tiny-mage", tmp_path / "model")
        with pytest.raises(SystemExit) as ended:
            main(["import", "tiny-vqgan", str(files["tiny-vqgan"]), "--out", str(tmp_path / "model")])
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1

    def test_of_one_that_was_not_imported_both_hashes_are_told(self, add, tmp_path, capsys):
        out = tmp_path / "model"
        add("tiny-mage-vqgan", tmp_path / "other")
        add("tiny-mage", tmp_path / "third")
        add("tiny-mage-vqgan", tmp_path / "third")
        known = ImagePipeline.from_pretrained(tmp_path / "third")
        save_parts(out, {"tokenizer": known.tokenizer})
        assert add("tiny-mage", out) == []
        warning = capsys.readouterr().err
        assert warning.startswith("warning: ") and warning.count("\n") == 1 and "that is tiny-mage-vqgan" in warning
        assert content_hash(known.tokenizer) in warning and content_hash(known.generator) in warning
        assert read_index(out)["imported"]["generator"]["tokenizer_hash"] == content_hash(known.tokenizer)

    def test_one_that_was_changed_by_hand_is_noticed(self, add, tmp_path, capsys):
        out = tmp_path / "model"
        add("tiny-mage-vqgan", out)
        add("tiny-vqgan", tmp_path / "other")
        shutil.copytree(tmp_path / "other" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
        add("tiny-mage", out)
        assert "nothing shows that the tokenizer" in capsys.readouterr().err

    def test_a_damaged_entry_is_named(self, add, tmp_path):
        out = tmp_path / "model"
        add("tiny-mage-vqgan", out)
        (out / "model_index.json").write_text(json.dumps(read_index(out) | {"imported": ["tiny"]}))
        with pytest.raises(UserError, match=r"model_index\.json: 'imported' is damaged"):
            add("tiny-mage", out)

    def test_one_that_came_with_its_generator_is_the_right_one(self, add, tmp_path, monkeypatch, capsys):
        network = {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 1, "sample_size": 8}
        blocks = {"block_out_channels": [4], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
        vae = AutoencoderKL(**blocks, norm_num_groups=2)
        DiTPipeline(DiTTransformer2DModel(**network), vae, DDIMScheduler()).save_pretrained(str(tmp_path / "diffusers"))
        facts = {"component": "generator", "family": "diffusers-dit", "config": network, "file": "tiny", "image_size": 8}
        preset = Preset(**facts, sampler={"num_steps": 2}, tokenizer=("sd-vae-ft-ema",), **COMMON)
        monkeypatch.setattr("genvision.presets.PRESETS", PRESETS | {"tiny-dit": preset})
        assert import_checkpoint("tiny-dit", tmp_path / "diffusers", tmp_path / "model") == []
        assert capsys.readouterr().err == ""
        assert "preset" not in read_index(tmp_path / "model")["imported"]["tokenizer"]
