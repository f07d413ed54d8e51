"""The README's commands are run as they stand there, on a tiny folder of photographs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genvision.cli import main
from genvision.config import load_train_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TINY = {
    "vq/vq_folder64.yaml": "--train.num_steps 2 --train.batch_size 4 --model.base_channels 8 --model.codebook_size 16 --data.num_workers 0",
    "llamagen/llamagen_cifar10.yaml": "--train.num_steps 2 --train.batch_size 4 --model.hidden_dim 32 --model.depth 1 --model.num_heads 2",
    "dit/flow_cifar10_pixels.yaml": "--train.num_steps 2 --train.batch_size 4 --model.hidden_dim 32 --model.depth 1 --model.num_heads 2 "
    "--train.preview_every 0 --data.num_workers 0",
}
"""What makes the recipes of the tour small enough for a test."""


def tour(number: int = 0) -> list[str]:
    """The commands of one of the blocks that can be run."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return blocks[number].strip().splitlines()


def run_all(commands: list[str]) -> None:
    """As they stand there, with recipes made small."""
    for command in commands:
        words = shlex.split(command)[1:]
        main(words + [word for recipe, changes in TINY.items() if recipe in words for word in shlex.split(changes)])


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twelve pictures of two classes in the folder `photos` of the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / ("cat" if i < 6 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)


def test_the_tour_from_an_image_folder_to_a_scored_model_runs(photos, tmp_path):
    commands = tour()
    assert [command.split()[1] for command in commands] == ["train", "reconstruct", "encode", "train", "sample", "evaluate"]
    run_all(commands[:-1])
    assert len(list((tmp_path / "runs/samples").glob("*.png"))) == 64
    # the last command needs Inception's weights, which are not part of the project: it must ask for them in one line
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(commands[-1])[1:])
    assert stop.value.code == 2


def test_the_tour_with_a_diffusion_transformer_runs(photos, tmp_path):
    commands = tour(1)
    assert [command.split()[1] for command in commands] == ["train", "sample"]
    run_all(commands)
    with Image.open(tmp_path / "runs/flow.png") as grid:
        assert min(grid.size) >= 8 * 32


def test_the_scores_of_the_tour_can_be_had_without_inception(tmp_path, monkeypatch):
    """The same evaluate command, with the small digits network in Inception's place."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for name in ("runs/samples", "photos/cat"):
        for i in range(12):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    words = shlex.split(tour()[-1])[1:]
    at = words.index("--inception-weights")
    main([*words[:at], "--extractor", "digits", *words[at + 2 :]])
    assert (tmp_path / "runs/scores.json").is_file()


def test_the_commands_that_score_a_model_run(tiny_model, tmp_path, monkeypatch):
    """As they stand, with digits in the place of ImageNet and its Inception, and few images."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"## Scores that can be trusted\n\n```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    commands = [shlex.split(line)[1:] for line in block[1].strip().splitlines()]
    assert [words[0] for words in commands] == ["fid", "sweep", "compare"]
    small = {"--model": str(tiny_model), "--num": "40", "--reference": "digits:second"}
    for words in commands:
        for option, value in small.items():
            if option in words:
                words[words.index(option) + 1] = value
        if "--inception-weights" in words:
            at = words.index("--inception-weights")
            del words[at : at + 2]
        if words[0] != "compare":
            words += ["--protocol", "digits", "--no-cache", "--device", "cpu", "--workers", "0"]
        main(words)
        if words[0] == "sweep":
            (tmp_path / "other.json").write_bytes((tmp_path / "runs/sweep/guidance_scale=1.5/results.json").read_bytes())
    for name in ("runs/fid/results.json", "runs/fid/page.html", "runs/sweep/sweep.html", "comparison.html"):
        assert (tmp_path / name).is_file(), name


def test_every_import_example_names_a_preset():
    from genvision.presets import PRESETS

    names = re.findall(r"genvision import (\S+) (\S+)", README)
    assert {PRESETS[name].component for name, _ in names} == {"tokenizer", "generator"}
    for name, file in names:
        assert PRESETS[name].file == file


def test_pictures_and_pages_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_commands_of_training_at_scale_are_right(photos, tmp_path, capsys):
    """The launcher's file is there and the recipe takes the options; the list of runs shows one of the tour."""
    launch, runs = tour(2)
    words = shlex.split(launch)
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    config, _ = load_train_config(words[words.index("train.py") + 1 :])
    assert config.tokenizer == "runs/vq16"
    run_all(tour(0)[:1])
    capsys.readouterr()
    main(shlex.split(runs)[1:])
    assert "finished" in capsys.readouterr().out
