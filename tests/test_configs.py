"""Every recipe in configs/: it says what it costs and gives, loads, survives being written down, and trains one step."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from genvision.cli import main
from genvision.config import MODELS, load_train_config, save_config, shipped_recipes
from genvision.jobs.encode import encode_data
from genvision.tokenizers.kl import KLTokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = shipped_recipes()

SMALL_MODELS: dict[str, dict[str, object]] = {
    "llamagen": {"hidden_dim": 16, "depth": 1, "num_heads": 2, "num_kv_heads": "null", "mlp_multiple_of": 8, "num_classes": "null"},
    "rar": {"hidden_dim": 16, "depth": 1, "num_heads": 2, "num_classes": "null"},
    "maskgit": {"hidden_dim": 16, "depth": 1, "num_heads": 8, "mlp_multiple_of": 8, "num_classes": "null"},  # 8 can be nested
    "mage": {"hidden_dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "dit": {"hidden_dim": 16, "depth": 1, "num_heads": 2, "num_classes": "null"},
    "vq": {"base_channels": 2, "num_res_blocks": 1, "norm_groups": 2},
    "vitok": {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("width", 8), ("depth", 1), ("heads", 2))},
    "kl": {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2},
    "titok": {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 8), ("depth", 1), ("heads", 2))},
}
"""Arguments that make a model tiny, by `model.name`; everything else stays as the recipe has it."""
SMALL_LOSS = {
    "perceptual_model": "test_resnet",
    "perceptual_image_size": 32,
    "adversarial.width": 4,
    "adversarial.num_layers": 1,
    "adversarial.start": 0,
    "adversarial.discriminator_start": 0,
    "adversarial.ramp": 0,
}
"""The smallest discriminator, heard from the first step; and a tiny perceptual network for the recipes that have a large one."""
FEATURE_NETWORK, FEATURE_DIM = "test_vit", 64
"""In the place of DINOv2, which REPA aligns a model with."""
SMALL_LOOP = {
    "num_steps": 1,
    "batch_size": 2,
    "accumulation": 1,
    "checkpoint_every": 1,
    "precision": "no",
    "compile": "false",
    "tracker": "null",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of three coloured pictures."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def perceptual_weights(tmp_path_factory) -> Path:
    """Weights of a tiny network of timm."""
    file = tmp_path_factory.mktemp("perceptual") / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def codes(photos, tiny_tokenizer, tmp_path_factory) -> Path:
    """The same as codes of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("codes") / "photos"
    encode_data(tiny_tokenizer, f"folder:{photos}", folder, flip=True)
    return folder


@pytest.fixture(scope="module")
def kl_tokenizer(tmp_path_factory) -> Path:
    """4 x 4 latents of 4 channels for 8 x 8 pixels, with a posterior."""
    folder = tmp_path_factory.mktemp("kl") / "tokenizer"
    KLTokenizer(image_size=8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(photos, kl_tokenizer, tmp_path_factory) -> Callable[[bool, bool], Path]:
    """The photos as latents, with deviations and features (2 x 2 tokens) where they are wanted; each kind is made once."""
    root = tmp_path_factory.mktemp("latents")
    weights = root / "features.safetensors"
    save_file(timm.create_model(FEATURE_NETWORK, num_classes=0).state_dict(), weights)

    def make(posterior: bool, with_features: bool) -> Path:
        folder = root / f"{posterior}-{with_features}"
        options = {"features": FEATURE_NETWORK, "features_weights": weights, "features_grid": 2} if with_features else {}
        if not folder.exists():
            encode_data(kl_tokenizer, f"folder:{photos}", folder, flip=True, posterior=posterior, **options)
        return folder

    return make


def words(section: str, options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{section}.{name}", str(value))]


def test_there_are_recipes_for_every_model():
    names = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.y*ml")}
    assert {name for name in names if not name.startswith("accelerate/")} == set(RECIPES)
    assert {load_train_config(["--config", recipe])[0].model["name"] for recipe in RECIPES} == set(MODELS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_hardware_time_and_the_number_to_expect(recipe):
    lines = (ROOT / "configs" / recipe).read_text().splitlines()
    opening = " ".join(line.removeprefix("#") for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert re.search(r"\b(CPU|GPU)", opening)
    assert re.search(r"\b(second|minute|hour|day)s?\b", opening)
    assert re.search(r"Expect: .*\d", opening)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_same_after_it_was_saved(recipe, tmp_path):
    config, resume = load_train_config(["--config", recipe])
    assert not resume
    save_config(config, tmp_path / "config.yaml")
    assert load_train_config(["--config", str(tmp_path / "config.yaml")])[0] == config


def spoken_of(recipe: str) -> list[str]:
    """Words of the command line that the comments of a recipe name for this recipe; those below `data` are of a tokenizer's."""
    comments = " ".join(line.removeprefix("#") for line in (ROOT / "configs" / recipe).read_text().splitlines() if line.startswith("#"))
    return " ".join(re.findall(r"--(?:model|loss|optim|train|sampler)\.\S+ [^\s,;)]*[^\s,;.)]", comments)).split()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if spoken_of(name)])
def test_changes_that_a_recipe_speaks_of_can_be_made(recipe):
    load_train_config(["--config", recipe, *spoken_of(recipe)])


def downsample(model: dict) -> int:
    """Pixels of a side per code of a side."""
    if model["name"] == "vq":
        return model["patch_size"] * 2 ** (len(model["encoder_multipliers"]) - 1)
    return 8 if model["name"] == "kl" else model["patch_size"]


def small_codebook(model: dict) -> dict[str, object]:
    """Few codes, where their number is free; as many channels around the quantiser as its recipe needs."""
    if model["name"] == "titok":
        return {"codebook_size": 16, "num_latent_tokens": 4}
    if model["name"] != "vq":
        return {}
    sizes = {} if model["quantizer"] != "vq" else {"codebook_size": 16}
    if model["quantizer"] == "lfq":
        sizes = {"codebook_size": 16, "codebook_dim": 4}
    return sizes | ({"z_channels": 4} if model["use_quant_conv"] else {"z_channels": 4, "codebook_dim": 4})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_a_step(recipe, photos, codes, latents, kl_tokenizer, tiny_tokenizer, perceptual_weights, tmp_path):
    config, _ = load_train_config(["--config", recipe])
    small = words("model", SMALL_MODELS[config.model["name"]]) + words("train", SMALL_LOOP)
    if config.model["name"] in ("maskgit", "mage"):
        small += words("sampler", {"num_steps": 2, "nesting": "1"})
    if config.model["name"] == "dit":
        small += words("sampler", {"num_steps": 2})
        small += words("loss.guidance", {"start_step": 0, "auto_every": 0})  # Model-guidance from the first step, where it is on
        if config.model["align_depth"]:
            small += words("model", {"align_depth": 1, "align_dims": [FEATURE_DIM], "align_hidden": 8})
    if config.stage == "tokenizer":
        size = max(8, 2 * downsample(config.model))
        small += words("data", {"spec": f"folder:{photos}", "image_size": size, "num_workers": 0})
        small += words("model", small_codebook(config.model))
        small += words("loss", SMALL_LOSS)
        if config.loss["perceptual"] != "none":
            small += words("loss", {"perceptual": "timm", "perceptual_weights": perceptual_weights})
        if config.init_from is not None:
            small += ["--init_from", "null"]
            started = tmp_path / "started"
            main(["train", "--config", recipe, "--output_dir", str(started), *small])
            small += ["--init_from", str(started / "model")]
    elif config.data.spec.startswith("encoded:") and config.model["name"] == "dit":
        folder = latents(config.data.posterior == "sample", bool(config.model["align_depth"]))
        small += [*words("data", {"spec": f"encoded:{folder}", "num_workers": 0}), "--tokenizer", str(kl_tokenizer)]
    elif config.data.spec.startswith("encoded:"):
        small += [*words("data", {"spec": f"encoded:{codes}"}), "--tokenizer", str(tiny_tokenizer)]
    else:
        small += words("data", {"spec": f"folder:{photos}", "image_size": 8, "num_workers": 0})
        if not config.tokenizer.startswith("pixels"):
            small += ["--tokenizer", str(tiny_tokenizer)]
    main(["train", "--config", recipe, "--output_dir", str(tmp_path / "run"), *small])

    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["skipped_steps"] == 0
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == (1 if config.train.preview_every else 0)
    part = "tokenizer" if config.stage == "tokenizer" else "generator"
    with safe_open(tmp_path / "run" / "model" / part / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
