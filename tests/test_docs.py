"""The commands of docs/tokenizers.md are run as they stand there, on a tiny folder of photographs."""

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from genvision.cli import main
from genvision.config import MODELS, recipe_path
from genvision.presets import PRESETS
from genvision.tokenizers.base import load_tokenizer
from genvision.tokenizers.quantizers import QUANTIZERS

PAGE = (Path(__file__).resolve().parents[1] / "docs/tokenizers.md").read_text()
TINY = {
    "vq/vq_folder64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.base_channels 8 --data.num_workers 0",
    "vitok/vitok_cifar10.yaml": "--train.num_steps 2 --train.batch_size 4 --model.encoder_depth 1 --data.num_workers 0",
}
"""What makes the recipes small enough for a test."""


def test_the_commands_for_tokenizers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "photos" / ("cat" if i < 4 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
    block = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line)[1:] for line in block[1].strip().splitlines()]
    assert [words[0] for words in commands] == ["train", "train", "reconstruct", "statistics", "encode", "decode"]
    for words in commands:
        for recipe, changes in TINY.items():
            if recipe in words:
                words += shlex.split(changes)
        main(words)
    with Image.open(tmp_path / "runs/latents.png") as grid:
        assert min(grid.size) > 2 * 64
    standardised = load_tokenizer(tmp_path / "runs/vitok_standardised")
    assert len(standardised.config.latent_std) == 16 and min(standardised.config.latent_std) > 0


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
