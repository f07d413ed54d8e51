"""The command line: what succeeds, and that every bad input gets one line, exit status 2, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genvision import __version__
from genvision.cli import COMMANDS, main
from genvision.errors import UserError
from genvision.tokenizers.vq import VQTokenizer

ROOT = Path(__file__).resolve().parents[1]


def genvision(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genvision", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cut(path: Path, keep: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


@pytest.fixture
def refused(capsys):
    """Run a command that must fail; returns its one line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert exit.value.code == 2
        assert out == ""
        assert err.startswith("genvision: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def refused_cleanly(refused, tmp_path):
    """The same, and nothing is found where the results would have been."""

    def run(*words: object) -> str:
        message = refused(*words)
        assert not [path for path in tmp_path.iterdir() if path.name.lstrip(".").startswith(("out", "run"))]
        return message

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of three 8 x 8 pictures."""
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "photos" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train_vq(tmp_path) -> list[str]:
    """Arguments that train a tiny tokenizer into `run`."""
    config = tmp_path / "vq.yaml"
    config.write_text(
        "stage: tokenizer\ndata: {spec: digits, image_size: 8, num_workers: 0}\n"
        "model: {name: vq, codebook_size: 16, base_channels: 4, encoder_multipliers: [1, 2], num_res_blocks: 1, z_channels: 4, "
        "norm_groups: 2}\n"
        "train: {num_steps: 2, batch_size: 4, ema_decays: [], checkpoint_every: 1, preview_every: 0}\n"
    )
    return ["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def train_llamagen(tmp_path, tiny_tokenizer, tiny_codes) -> list[str]:
    """Arguments that train a tiny generator into `run`."""
    config = tmp_path / "llamagen.yaml"
    config.write_text(
        f"stage: generator\ntokenizer: {tiny_tokenizer}\ndata: {{spec: 'encoded:{tiny_codes}', num_workers: 0}}\n"
        "model: {name: llamagen, hidden_dim: 16, depth: 1, num_heads: 2, mlp_multiple_of: 8}\n"
        "train: {num_steps: 2, batch_size: 4, ema_decays: [], checkpoint_every: 1, preview_every: 0}\n"
    )
    return ["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]


@pytest.fixture
def train_dit(tmp_path) -> list[str]:
    """Arguments that train a tiny flow transformer into `run`, for which pictures are pixels."""
    config = tmp_path / "dit.yaml"
    config.write_text(
        "stage: generator\ntokenizer: pixels:gray\ndata: {spec: digits, image_size: 8, num_workers: 0}\n"
        "model: {name: dit, hidden_dim: 16, depth: 1, num_heads: 2, path: linear, prediction: velocity}\n"
        "train: {num_steps: 2, batch_size: 4, ema_decays: [0.9], checkpoint_every: 1, preview_every: 0}\n"
    )
    return ["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]


class TestWithoutWork:
    def test_the_bare_command_prints_help_and_fails(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main([])
        assert exit.value.code == 2
        assert all(f"\n  {name} " in capsys.readouterr().out for name in ["demo"])

    @pytest.mark.parametrize("word", ["-h", "--help"])
    def test_help_names_every_command(self, capsys, word):
        with pytest.raises(SystemExit) as exit:
            main([word])
        assert exit.value.code == 0
        help = capsys.readouterr().out
        assert all(f"\n  {name} " in help for name in COMMANDS)
        assert max(map(len, help.splitlines())) < 140

    @pytest.mark.parametrize("name", sorted(COMMANDS))
    def test_every_command_explains_its_options(self, capsys, name):
        with pytest.raises(SystemExit) as exit:
            main([name, "--help"])
        assert exit.value.code == 0
        help = capsys.readouterr().out
        assert f"genvision {name}" in help
        assert "--config" in help if name == "train" else "--" in help

    def test_help_of_train_shows_the_keys_of_a_recipe(self, capsys):
        for words, key in (
            (["--config", "vq/vq_digits.yaml"], "--model.codebook_dim"),
            (["--model.name", "llamagen"], "--sampler.top_p"),
        ):
            with pytest.raises(SystemExit) as exit:
                main(["train", *words, "--help"])
            assert exit.value.code == 0
            assert key in capsys.readouterr().out

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["--version"])
        assert exit.value.code == 0
        assert capsys.readouterr().out == f"genvision {__version__}\n"

    def test_presets_are_listed_and_shown(self, capsys):
        main(["presets"])
        assert "llamagen-c2i-b-256" in capsys.readouterr().out
        main(["presets", "llamagen-c2i-b-256"])
        assert "c2i_B_256.pt" in capsys.readouterr().out

    def test_a_wrong_command_is_told_the_nearest(self, refused):
        assert "did you mean 'sample'?" in refused("smaple")
        assert "presets" in refused("zzz")

    def test_a_wrong_option_is_told_the_nearest(self, refused, tmp_path):
        assert "--batch-size" in refused("sample", "--model", tmp_path, "--out", "x", "--batchsize", "3")

    def test_a_missing_option_is_named(self, refused):
        assert "--out" in refused("sample", "--model", "x")

    def test_debug_shows_the_exception(self, tmp_path, out):
        with pytest.raises(UserError, match="no such folder"):
            main(["sample", "--debug", "--model", str(tmp_path / "nothing"), "--out", str(out)])


class TestProcesses:
    """Exit statuses as a shell sees them."""

    def test_success_is_0(self, tiny_model, out):
        result = genvision("sample", "--model", tiny_model, "--num", 2, "--classes", "3,7", "--out", out)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{out}\n"
        assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "job.json", "labels.json"]

    def test_a_users_mistake_is_2_with_one_line(self, tiny_model, out):
        result = genvision("sample", "--model", tiny_model, "--classes", "10", "--out", out)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr == "genvision: class 10 is out of range; the model has classes 0 .. 9\n"
        assert not out.exists()

    def test_debug_shows_a_traceback(self):
        result = genvision("--debug", "presets", "llamagen")
        assert result.returncode == 1
        assert "Traceback" in result.stderr and "UserError" in result.stderr

    def test_no_command_is_2(self):
        result = genvision()
        assert result.returncode == 2
        assert result.stdout.startswith("usage: genvision COMMAND")


class TestSample:
    def test_missing_model(self, refused_cleanly, tmp_path, out):
        message = refused_cleanly("sample", "--model", tmp_path / "nothing", "--out", out)
        assert str(tmp_path / "nothing") in message and "no such folder" in message

    def test_empty_model_folder(self, refused_cleanly, tmp_path, out):
        (tmp_path / "empty").mkdir()
        assert "model_index.json" in refused_cleanly("sample", "--model", tmp_path / "empty", "--out", out)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--classes", "10"], "class 10 is out of range; the model has classes 0 .. 9"),
            (["--classes", "0,-1"], "class -1 is out of range"),
            (["--classes", "cat"], "class 'cat' is unknown"),
            (["--classes", ""], "class '' is unknown"),
            (["--guidance", "-1"], "guidance scale -1.0"),
            (["--guidance", ".nan"], "guidance scale nan"),
            (["--guidance", "nan"], "--guidance: expected float or null, got 'nan'"),
            (["--guidance", "much"], "--guidance"),
            (["--guidance-schedule", "sine"], "--guidance-schedule"),
            (["--guidance-interval", "[0.5, 0.2]"], "guidance interval 0.5 .. 0.2"),
            (["--guidance-interval", "[0, 0.5]", "--cfg-interval", "3"], "give one of them"),
            (["--num", "0"], "num must be at least 1"),
            (["--batch-size", "0"], "batch_size must be at least 1"),
            (["--seed", "-1"], "seed -1"),
            (["--temperature", "-0.1"], "temperature -0.1"),
            (["--top-k", "-1"], "top_k -1"),
            (["--top-p", "0"], "top_p 0"),
            (["--dtype", "float8"], "--dtype"),
            (["--complete", "nothing.png"], "nothing.png: no such file"),
        ],
    )
    def test_impossible_option(self, refused_cleanly, tiny_model, out, options, expected):
        assert expected in refused_cleanly("sample", "--model", tiny_model, "--out", out, *options)

    @pytest.mark.parametrize(
        ("fixture", "options", "expected"),
        [
            ("tiny_flow", ["--steps", "0"], "num_steps must be at least 1 with method euler, got 0"),
            ("tiny_flow", ["--method", "euler-maruyama", "--steps", "1"], "num_steps must be at least 2"),
            ("tiny_diffusion", ["--steps", "0"], "1 .. 1000"),
            ("tiny_diffusion", ["--steps", "1001"], "1 .. 1000"),
            ("tiny_diffusion", ["--steps", "many"], "--steps"),
            ("tiny_flow", ["--method", "ddim"], "method 'ddim' is unknown; choose one of euler"),
            ("tiny_diffusion", ["--method", "euler"], "method 'euler' is unknown; choose one of ddpm"),
            ("tiny_flow", ["--time-shift", "0.3"], "time_shift 0.3"),
            ("tiny_diffusion", ["--time-shift", "3"], "DiffusionSampler has no option 'time_shift'"),
            ("tiny_flow", ["--method", "dopri5", "--time-shift", "3"], "dopri5 chooses its own times"),
            ("tiny_flow", ["--guidance-interval", "[0, 1.5]"], "guidance interval 0.0 .. 1.5"),
            ("tiny_flow", ["--guidance-interval", "[-0.1, 1]"], "guidance interval -0.1 .. 1.0"),
            ("tiny_flow", ["--guidance-channels", "2"], "the latents have 1 channels"),
            ("tiny_flow", ["--guidance-channels", "0"], "guidance channels 0"),
            ("tiny_flow", ["--scale-condition", "1.5"], "scale_condition is for scale-conditioned models"),
            ("tiny_diffusion", ["--scale-condition", "1.5"], "scale_condition is for scale-conditioned models"),
            ("tiny_flow", ["--cfg-interval", "3"], "cfg-interval counts tokens, and this model draws latents; give guidance-interval"),
            ("tiny_flow", ["--temperature", "0.5"], "FlowSampler has no option 'temperature'"),
            ("tiny_flow", ["--guide", "nothing"], "nothing: no such folder"),
            ("tiny_model", ["--steps", "5"], "AutoregressiveSampler has no option 'num_steps'"),
            ("tiny_model", ["--method", "euler"], "AutoregressiveSampler has no option 'method'"),
        ],
    )
    def test_impossible_option_of_latents(self, refused_cleanly, request, out, fixture, options, expected):
        assert expected in refused_cleanly("sample", "--model", request.getfixturevalue(fixture), "--out", out, *options)

    def test_a_guide_of_another_kind(self, refused_cleanly, tiny_model, tiny_flow, tiny_diffusion, out):
        def guided(model, guide):
            return refused_cleanly("sample", "--model", model, "--guide", guide, "--guidance", "2", "--out", out)

        assert "the guide has path ddpm, the model linear" in guided(tiny_flow, tiny_diffusion)
        assert "guide" in guided(tiny_flow, tiny_model)
        assert "a guide is for samplers of latents" in guided(tiny_model, tiny_flow)

    def test_latents_cannot_be_completed(self, refused_cleanly, tiny_flow, out, photos):
        picture = photos / "cat" / "0.png"
        message = refused_cleanly("sample", "--model", tiny_flow, "--out", out, "--complete", picture)
        assert "--complete: this model draws latents" in message

    def test_the_same_of_a_job_that_scores(self, refused_cleanly, tiny_flow, out):
        job = ("fid", "--model", tiny_flow, "--num", "40", "--reference", "digits", "--protocol", "digits", "--out", out, "--device", "cpu")
        assert "num_steps must be at least 1" in refused_cleanly(*job, "--steps", "0")
        assert "cfg-interval counts tokens" in refused_cleanly(*job, "--cfg-interval", "3")
        assert "no such folder" in refused_cleanly(*job, "--guide", "nothing")

    @pytest.mark.parametrize("path", ["linear", "ddpm"])
    def test_guidance_of_latents_without_a_null_class(self, refused, train_dit, tmp_path, out, path):
        prediction = {"linear": "velocity", "ddpm": "noise"}[path]
        main([*train_dit, "--model.class_dropout", "0", "--model.path", path, "--model.prediction", prediction])
        message = refused("sample", "--model", tmp_path / "run" / "model", "--out", out, "--guidance", "2")
        assert "no null class to guide with" in message
        assert not out.exists()

    @pytest.mark.parametrize("keep", ["0", "1", "0.01", "1.5"])
    def test_a_part_to_keep_that_leaves_nothing(self, refused_cleanly, tiny_model, out, photos, keep):
        picture = photos / "cat" / "0.png"
        assert f"keep {float(keep)}" in refused_cleanly(
            "sample", "--model", tiny_model, "--out", out, "--complete", picture, "--keep", keep
        )

    def test_a_picture_that_is_none(self, refused_cleanly, tiny_model, out, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        assert "text.png: cannot be read" in refused_cleanly(
            "sample", "--model", tiny_model, "--out", out, "--complete", tmp_path / "text.png"
        )

    @pytest.mark.parametrize("name", ["out.jpg", "out.tar"])
    def test_a_format_that_is_none(self, refused_cleanly, tiny_model, tmp_path, name):
        assert "is no format for images" in refused_cleanly("sample", "--model", tiny_model, "--out", tmp_path / name)

    @pytest.mark.parametrize("part", ["generator", "tokenizer"])
    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_truncated_weights(self, refused_cleanly, model, out, part, keep):
        cut(model / part / "diffusion_pytorch_model.safetensors", keep)
        message = refused_cleanly("sample", "--model", model, "--out", out)
        assert f"{model / part}: the {part} cannot be loaded" in message

    @pytest.mark.parametrize("name", ["model_index.json", "generator/config.json", "tokenizer/config.json", "sampler/config.json"])
    def test_a_truncated_description(self, refused_cleanly, model, out, name):
        cut(model / name)
        assert str(model / name) in refused_cleanly("sample", "--model", model, "--out", out)

    @pytest.mark.parametrize("name", ["model_index.json", "generator/config.json", "sampler/config.json"])
    def test_a_description_that_is_no_mapping(self, refused_cleanly, model, out, name):
        (model / name).write_text("[]")
        assert str(model / name) in refused_cleanly("sample", "--model", model, "--out", out)

    @pytest.mark.parametrize("part", ["generator", "tokenizer", "sampler"])
    def test_a_missing_part(self, refused_cleanly, model, out, part):
        shutil.rmtree(model / part)
        assert f"the {part} is missing" in refused_cleanly("sample", "--model", model, "--out", out)

    def test_weights_of_another_size(self, refused_cleanly, model, out):
        path = model / "generator" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dim": 64}))
        assert "the generator cannot be loaded" in refused_cleanly("sample", "--model", model, "--out", out)

    def test_guidance_of_a_model_without_null_class(self, refused, train_llamagen, tmp_path, out):
        main([*train_llamagen, "--model.class_dropout", "0"])
        message = refused("sample", "--model", tmp_path / "run" / "model", "--out", out, "--guidance", "2")
        assert "class_dropout" in message
        assert not out.exists()

    @pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
    def test_another_jobs_results_stay(self, refused, tiny_model, tmp_path, name):
        words = ["sample", "--model", str(tiny_model), "--num", "4", "--out", str(tmp_path / name)]
        main(words)
        before = contents(tmp_path)
        message = refused(*words, "--seed", "1")
        assert "already holds another job's results" in message and "seed" in message
        assert contents(tmp_path) == before
        main(words)  # the same job is welcome
        assert contents(tmp_path) == before

    def test_foreign_files_stay(self, refused, tiny_model, tmp_path, out):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        (tmp_path / "out.npz").write_text("mine")
        (tmp_path / "file").write_text("mine")
        before = contents(tmp_path)
        assert "already holds something else" in refused("sample", "--model", tiny_model, "--out", out)
        assert "already holds something else" in refused("sample", "--model", tiny_model, "--out", tmp_path / "out.npz")
        assert "is a file" in refused("sample", "--model", tiny_model, "--out", tmp_path / "file")
        assert "file" in refused("sample", "--model", tiny_model, "--out", tmp_path / "file" / "below")
        assert "file" in refused("sample", "--model", tiny_model, "--out", tmp_path / "file" / "below.npz")
        assert contents(tmp_path) == before


class TestEncode:
    def test_success(self, tiny_tokenizer, photos, tmp_path, capsys):
        main(["encode", "--tokenizer", str(tiny_tokenizer), "--data", f"folder:{photos}", "--out", str(tmp_path / "codes"), "--flip"])
        assert "6 images in 2 views, codes of shape [4, 4]" in capsys.readouterr().out

    def test_missing_tokenizer(self, refused_cleanly, tmp_path, out):
        assert "nothing" in refused_cleanly("encode", "--tokenizer", tmp_path / "nothing", "--data", "digits", "--out", out)

    def test_truncated_tokenizer(self, refused_cleanly, model, out):
        cut(model / "tokenizer" / "diffusion_pytorch_model.safetensors")
        assert "the tokenizer cannot be loaded" in refused_cleanly("encode", "--tokenizer", model, "--data", "digits", "--out", out)

    @pytest.mark.parametrize("size", ["9", "1", "0", "-8"])
    def test_a_size_that_the_tokenizer_cannot_take(self, refused_cleanly, tiny_tokenizer, out, size):
        message = refused_cleanly("encode", "--tokenizer", tiny_tokenizer, "--data", "digits", "--out", out, "--image-size", size)
        assert f"image size {size} does not fit the tokenizer" in message and "multiple of 2" in message

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("folder:{}/nothing", "no such folder"),
            ("folder:{}/empty", "no images"),
            ("parquet:{}/*.parquet", "no file matches"),
            ("npz:{}/nothing.npz", "no such file"),
            ("encoded:{}/empty", "holds codes, not images"),
            ("flder:{}/empty", "did you mean folder"),
            ("{}/nothing", "nothing"),
        ],
    )
    def test_data_that_is_not_there(self, refused_cleanly, tiny_tokenizer, tmp_path, out, spec, expected):
        (tmp_path / "empty").mkdir()
        message = refused_cleanly("encode", "--tokenizer", tiny_tokenizer, "--data", spec.format(tmp_path), "--out", out)
        assert expected in message

    @pytest.mark.parametrize(("option", "value"), [("--batch-size", "0"), ("--workers", "-1"), ("--crops", "nine")])
    def test_impossible_option(self, refused_cleanly, tiny_tokenizer, out, option, value):
        message = refused_cleanly("encode", "--tokenizer", tiny_tokenizer, "--data", "digits", "--out", out, option, value)
        assert option.removeprefix("--").replace("-", "_") in message

    def test_an_unreadable_image_is_named(self, refused, tiny_tokenizer, photos, out):
        cut(photos / "dog" / "4.png")
        message = refused("encode", "--tokenizer", tiny_tokenizer, "--data", f"folder:{photos}", "--out", out)
        assert str(photos / "dog" / "4.png") in message
        assert not (out / "index.json").exists()

    def test_another_jobs_results_stay(self, refused, tiny_tokenizer, photos, out):
        words = ["encode", "--tokenizer", str(tiny_tokenizer), "--data", f"folder:{photos}", "--out", str(out)]
        main(words)
        before = contents(out)
        assert "flip" in refused(*words, "--flip")
        assert contents(out) == before

    def test_foreign_files_stay(self, refused, tiny_tokenizer, out, tmp_path):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        assert "is not empty" in refused("encode", "--tokenizer", tiny_tokenizer, "--data", "digits", "--out", out)
        refused("encode", "--tokenizer", tiny_tokenizer, "--data", "digits", "--out", tmp_path / "file")
        refused("encode", "--tokenizer", tiny_tokenizer, "--data", "digits", "--out", tmp_path / "file" / "below")
        assert contents(out) == {"thesis.txt": b"mine"}


class TestTrain:
    def test_missing_config(self, refused_cleanly, tmp_path):
        assert "nothing.yaml: no such file" in refused_cleanly("train", "--config", tmp_path / "nothing.yaml")

    def test_a_typo_in_the_file_names_file_key_and_nearest(self, refused_cleanly, train_vq, tmp_path):
        config = tmp_path / "vq.yaml"
        config.write_text(config.read_text().replace("batch_size", "batchsize"))
        message = refused_cleanly(*train_vq)
        assert str(config) in message and "'train.batchsize'" in message and "'train.batch_size'" in message

    def test_a_typo_on_the_command_line(self, refused_cleanly, train_vq):
        message = refused_cleanly(*train_vq, "--train.batchsize", "3")
        assert "'train.batchsize'" in message and "'train.batch_size'" in message

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--data.spec", "folder:nothing"], "nothing: no such folder"),
            (["--data.spec", "encoded:nothing"], "data.spec encoded:nothing: a tokenizer is trained on images"),
            (["--data.image_size", "9"], "image size 9 does not fit the tokenizer"),
            (["--data.image_size", "null"], "data.image_size is missing"),
            (["--train.num_steps", "0"], "train.num_steps must be at least 1"),
            (["--train.batch_size", "5", "--train.accumulation", "2"], "train.batch_size 5 does not divide"),
            (["--train.ema_decays", "[1.5]"], "train.ema_decays"),
            (["--train.tracker", "tensorbord"], "train.tracker tensorbord"),
            (["--train.precision", "fp16"], "train.precision fp16"),
            (["--model.norm_groups", "3"], "norm_groups 3"),
            (["--model.base_channels", "0"], "base_channels"),
            (["--model.codebook_size", "0"], "codebook_size"),
            (["--loss.revive_every", "-1"], "loss.revive_every"),
            (["--optim.lr", "-1"], "optim.lr"),
            (["--data.num_workers", "-1"], "data.num_workers"),
            (["--model.codebook_dim", "many"], "model.codebook_dim"),
            (["--seed", "-1"], "seed"),
        ],
    )
    def test_impossible_tokenizer_run(self, refused_cleanly, train_vq, options, expected):
        assert expected in refused_cleanly(*train_vq, *options)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--data.spec", "encoded:nothing"], "nothing: no encoded data here"),
            (["--data.spec", "digits", "--data.image_size", "9"], "image size 9 does not fit the tokenizer"),
            (["--model.num_classes", "9"], "has label 9, but model.num_classes is 9; it must be at least 10"),
            (["--tokenizer", "nothing"], "nothing: no tokenizer here"),
            (["--tokenizer", "null"], "tokenizer is missing"),
            (["--model.num_heads", "3"], "num_heads 3"),
            (["--model.depth", "0"], "depth"),
            (["--model.token_dropout", "2"], "dropout"),
            (["--model.class_dropout", "0", "--sampler.guidance_scale", "2"], "model.class_dropout is 0"),
            (["--model.condition", "text"], "condition"),
            (["--sampler.guidance_scale", "-1"], "guidance scale -1"),
            (["--sampler.top_p", "2"], "top_p 2"),
        ],
    )
    def test_impossible_generator_run(self, refused_cleanly, train_llamagen, options, expected):
        assert expected in refused_cleanly(*train_llamagen, *options)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--tokenizer", "pixels:grey"], "tokenizer 'pixels:grey' is unknown; give pixels"),
            (["--data.image_size", "null"], "data.image_size is missing; tokenizer pixels:gray needs"),
            (["--model.num_classes", "9"], "has label 9, but model.num_classes is 9"),
            (["--model.patch_size", "3"], "input_size 8 must be a multiple of patch_size 3"),
            (["--model.num_heads", "3"], "num_heads 3"),
            (["--model.class_dropout", "2"], "class_dropout must lie in 0 .. 1"),
            (["--model.path", "cubic"], "path 'cubic' is unknown"),
            (["--model.time_input", "step"], "time_input step does not go with path linear"),
            (["--model.path", "ddpm", "--model.prediction", "score"], "prediction score is for flows"),
            (["--model.align_depth", "1"], "with align_dims"),
            (["--model.align_depth", "1", "--model.align_dims", "[8]"], "data.features is missing"),
            (["--data.features", "dinov2_vitb14"], "the model is not aligned with features"),
            (["--data.features_download", "true"], "data.features_download"),
            (["--model.class_dropout", "0", "--sampler.guidance_scale", "2"], "no null class to guide with"),
            (["--model.class_dropout", "0", "--loss.guidance.scale", "1.45"], "model.class_dropout is 0"),
            (["--train.ema_decays", "[]", "--loss.guidance.scale", "1.45"], "train.ema_decays is empty"),
            (["--loss.guidance.scale", "0.5"], "loss.guidance.scale 0.5"),
            (["--loss.guidance.scale", "2", "--loss.guidance.max_time", "1.5"], "loss.guidance.max_time 1.5"),
            (["--loss.guidance.drop_rate", "2"], "loss.guidance.drop_rate 2"),
            (["--loss.guidance.scale", "2", "--loss.guidance.scale_max", "3"], "go together"),
            (["--loss.time_shift", "0"], "loss.time_shift must be above 0"),
            (["--loss.weighting", "velocity"], "loss.weighting velocity is for noise and score"),
            (["--loss.min_snr_gamma", "5"], "unknown key 'loss.min_snr_gamma'"),
            (["--model.path", "ddpm", "--model.prediction", "noise", "--loss.time_shift", "2"], "unknown key 'loss.time_shift'"),
            (["--model.path", "ddpm", "--model.prediction", "noise", "--sampler.num_steps", "1001"], "1 .. 1000"),
            (["--sampler.num_steps", "0"], "num_steps must be at least 1"),
            (["--sampler.method", "ddim"], "method 'ddim' is unknown"),
            (["--sampler.scale_condition", "1.5"], "scale_condition is for scale-conditioned models"),
            (["--sampler.guidance_channels", "3"], "guidance_channels 3"),
        ],
    )
    def test_impossible_diffusion_run(self, refused_cleanly, train_dit, options, expected):
        assert expected in refused_cleanly(*train_dit, *options)

    def test_guidance_that_adapts_itself_is_checked_before_the_first_step(self, refused_cleanly, train_dit, tmp_path):
        guided = [*train_dit, "--loss.guidance.scale", "2", "--loss.guidance.auto_every", "1", "--loss.guidance.auto_num", "10"]
        assert "--inception-weights" in refused_cleanly(*guided)
        digits = ["--loss.guidance.auto_extractor", "digits", "--loss.guidance.auto_reference"]
        assert "nothing" in refused_cleanly(*guided, *digits, f"folder:{tmp_path / 'nothing'}")

    def test_tokenizer_and_generator_of_different_kinds(self, refused_cleanly, train_dit, train_llamagen, tiny_tokenizer):
        message = refused_cleanly(*train_dit, "--tokenizer", tiny_tokenizer)
        assert "makes discrete codes, but dit needs a tokenizer with continuous latents" in message
        message = refused_cleanly(*train_llamagen, "--tokenizer", "pixels", "--data.spec", "digits", "--data.image_size", "8")
        assert "makes continuous latents, but llamagen needs a tokenizer with a codebook" in message

    def test_options_of_generators_mean_nothing_to_a_tokenizer(self, refused_cleanly, train_vq):
        for options in (["--data.posterior", "sample"], ["--data.features", "dinov2_vitb14"]):
            assert "are for training generators" in refused_cleanly(*train_vq, *options)

    def test_codes_of_another_tokenizer(self, refused_cleanly, train_llamagen, tmp_path):
        torch.manual_seed(1)
        options = {"base_channels": 4, "encoder_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 2}
        VQTokenizer(image_size=8, codebook_size=16, codebook_dim=4, **options).save_pretrained(tmp_path / "other")
        message = refused_cleanly(*train_llamagen, "--tokenizer", tmp_path / "other")
        assert "its codes were made by tokenizer" in message and "genvision encode again" in message

    def test_another_runs_results_stay(self, refused, train_vq, tmp_path):
        main(train_vq)
        before = contents(tmp_path / "run")
        del before["run.lock"]
        message = refused(*train_vq, "--optim.lr", "0.5")
        assert "optim.lr" in message and "0.5" in message and "--allow-change optim.lr" in message
        after = contents(tmp_path / "run")
        del after["run.lock"]
        assert after == before

    def test_foreign_files_stay(self, refused, train_vq, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("mine")
        assert "config.yaml is missing" in refused(*train_vq)
        assert contents(tmp_path / "run") == {"thesis.txt": b"mine"}

    def test_an_output_folder_that_is_a_file(self, refused, train_vq, tmp_path):
        (tmp_path / "run").write_text("mine")
        assert str(tmp_path / "run") in refused(*train_vq)
        assert str(tmp_path / "run") in refused(*train_vq, "--output_dir", tmp_path / "run" / "below")

    def test_a_damaged_only_checkpoint_is_named(self, capsys, train_vq, tmp_path):
        main([*train_vq, "--train.checkpoint_every", "9"])
        longer = [*train_vq, "--train.num_steps", "3"]
        checkpoints = tmp_path / "run" / "checkpoints"
        (newest,) = checkpoints.iterdir()
        whole = {path.name: path.read_bytes() for path in newest.iterdir()}
        assert sorted(whole) == ["model.safetensors", "optimizer.safetensors", "rng_0.pt", "stage.pt", "state.json"]
        for name, data in whole.items():
            for damaged in (data[: len(data) // 2], b"\xff" * len(data)):
                (newest / name).write_bytes(damaged)
                with pytest.raises(SystemExit):
                    main(longer)
                told = capsys.readouterr().err.splitlines()
                assert f"{newest / name}: the checkpoint is damaged" in told[-2] and "it is set aside" in told[-2]
                assert "none of its checkpoints can be read; restore one, or delete the folder of the run" in told[-1]
                (checkpoints / f"{newest.name}.damaged").rename(newest)
            (newest / name).write_bytes(data)
        main(longer)


class TestReconstruct:
    def test_success(self, tiny_tokenizer, photos, out, capsys):
        main(["reconstruct", "--tokenizer", str(tiny_tokenizer), "--data", f"folder:{photos}", "--out", str(out), "--extractor", "none"])
        assert "psnr" in capsys.readouterr().out.lower()
        assert sorted(path.name for path in out.iterdir()) == ["codes.npz", "reconstructions.png", "results.json"]

    def test_bad_input_leaves_nothing(self, refused_cleanly, tiny_tokenizer, tmp_path, photos, out):
        (tmp_path / "empty").mkdir()
        good = ["reconstruct", "--tokenizer", tiny_tokenizer, "--data", f"folder:{photos}", "--out", out, "--extractor", "none"]
        for options, expected in (
            (["--tokenizer", tmp_path / "nothing"], "nothing"),
            (["--tokenizer", tmp_path / "empty"], "no tokenizer here"),
            (["--data", f"folder:{tmp_path / 'nothing'}"], "no such folder"),
            (["--data", f"folder:{tmp_path / 'empty'}"], "no images"),
            (["--image-size", "9"], "image size 9 does not fit"),
            (["--extractor", "digit"], "digit"),
            (["--extractor", "inception", "--inception-weights", tmp_path / "nothing.pth"], "nothing.pth"),
            (["--extractor", "inception"], "--inception-weights"),
            (["--num", "0"], "at least 2 images"),
            (["--batch-size", "0"], "batch"),
            (["--device", "gpu"], "device"),
        ):
            assert expected in refused_cleanly(*good, *options), options
            assert not out.exists(), options

    def test_foreign_files_stay(self, refused, tiny_tokenizer, photos, out):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        words = ["reconstruct", "--tokenizer", tiny_tokenizer, "--data", f"folder:{photos}", "--out", out, "--extractor", "none"]
        assert "already holds another job's results" in refused(*words)
        assert contents(out) == {"thesis.txt": b"mine"}


class TestEvaluate:
    def test_bad_input(self, refused, photos, tmp_path):
        (tmp_path / "empty").mkdir()
        good = ["evaluate", "--generated", f"folder:{photos}", "--reference", "digits:second", "--extractor", "digits"]
        json_file = tmp_path / "results.json"
        for options, expected in (
            (["--generated", f"folder:{tmp_path / 'nothing'}"], "no such folder"),
            (["--generated", f"folder:{tmp_path / 'empty'}"], "no images"),
            (["--reference", f"npz:{tmp_path / 'nothing.npz'}"], "nothing.npz"),
            (["--metrics", "fid,kid2"], "kid2"),
            (["--extractor", "digit"], "digit"),
            (["--extractor", "inception", "--inception-weights", tmp_path / "nothing.pth"], "nothing.pth"),
            (["--extractor", "inception"], "--inception-weights"),
            (["--batch-size", "0"], "batch"),
            (["--device", "gpu"], "device"),
            (["--html", tmp_path / "empty"], "empty: is a folder"),
        ):
            assert expected in refused(*good, "--json", json_file, *options), options
            assert not json_file.exists(), options


class TestScoring:
    """evaluate, fid, sweep, statistics and compare as they are typed."""

    digits = ("--protocol", "digits", "--no-cache", "--workers", "0", "--device", "cpu")

    def test_a_set_of_images_becomes_a_table_a_file_and_a_page(self, tmp_path, capsys):
        files = [tmp_path / name for name in ("a.json", "a.html")]
        main(
            [
                "evaluate",
                "--generated",
                "digits:first",
                "--reference",
                "digits:second",
                *self.digits,
                "--json",
                str(files[0]),
                "--html",
                str(files[1]),
            ]
        )
        table = capsys.readouterr().out
        assert table.startswith("FID ") and "precision" in table and "depends on the order" in table
        content = json.loads(files[0].read_text())
        assert content["protocol"] == "digits" and content["fid"] < 5
        assert "<html" in files[1].read_text()

    def test_a_model_is_sampled_scored_swept_and_compared(self, tiny_model, tmp_path, capsys):
        statistics = tmp_path / "digits.safetensors"
        main(["statistics", "--data", "digits:second", "--out", str(statistics), "--protocol", "digits", "--device", "cpu"])
        model = ["--model", str(tiny_model), "--reference", str(statistics), "--num", "80", *self.digits]
        main(["fid", *model, "--guidance", "1.5", "--labels", "random", "--out", str(tmp_path / "fid")])
        assert str(tmp_path / "fid") in capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "fid").iterdir()) == ["chunks", "page.html", "results.json"]
        main(["sweep", *model, "--guidance", "1:2:1", "--out", str(tmp_path / "sweep")])
        assert "best: guidance_scale=" in capsys.readouterr().out
        results = [tmp_path / "fid" / "results.json", tmp_path / "sweep" / "guidance_scale=1" / "results.json"]
        main(["compare", *map(str, results), "--html", str(tmp_path / "compare.html")])
        assert "sampling" in capsys.readouterr().out
        assert (tmp_path / "compare.html").is_file()

    def test_what_fid_does_not_say(self, tiny_model, tmp_path, capsys):
        cpu = ["--device", "cpu", "--workers", "0"]
        sets = ["--generated", "digits:first", "--real", "digits:second", "--no-flip", "--architecture", "resnet20", "--steps", "6"]
        main(["cas", *sets, "--out", str(tmp_path / "cas"), *cpu])
        main(
            [
                "probe",
                "--model",
                str(tiny_model),
                "--train",
                "digits:first",
                "--test",
                "digits:second",
                "--out",
                str(tmp_path / "probe"),
                *cpu,
            ]
        )
        sets = ["--generated", "digits:first", "--train", "digits:second", "--extractor", "digits", "--num", "40"]
        main(["neighbours", *sets, "--out", str(tmp_path / "neighbours"), *cpu])
        said = capsys.readouterr().out
        assert all(str(tmp_path / name) in said for name in ("cas", "probe", "neighbours"))
        for name, files in (("cas", ["results.json"]), ("probe", ["probe.svg", "results.json"])):
            assert sorted(path.name for path in (tmp_path / name).iterdir()) == files
        assert {"neighbours.png", "results.json"} <= {path.name for path in (tmp_path / "neighbours").iterdir()}

    def test_bad_input_leaves_nothing(self, refused_cleanly, tiny_model, tmp_path, out):
        broken = tmp_path / "broken.npz"
        np.savez(broken, mu=np.zeros(64), sigma=np.eye(64))
        cut(broken)
        wrong = tmp_path / "wrong.npz"
        np.savez(wrong, mean=np.zeros(64))
        model = ("fid", "--model", tiny_model, "--num", "40", "--out", out, *self.digits)
        assert "broken.npz: not an npz file, or damaged" in refused_cleanly(*model, "--reference", broken)
        assert "wrong.npz: has mean; expected statistics mu and sigma" in refused_cleanly(*model, "--reference", wrong)
        assert "protocol 'adn' is unknown" in refused_cleanly(*model, "--reference", "digits", "--protocol", "adn")
        assert "sfid" in refused_cleanly(*model, "--reference", "digits", "--metrics", "fid,sfid")
        assert "at least 10 images" in refused_cleanly(*model[:4], "5", *model[5:], "--reference", "digits", "--metrics", "is")
        assert "--cache and --no-cache" in refused_cleanly(*model, "--reference", "digits", "--cache", tmp_path / "cache")
        assert "--guidance 2:1:1" in refused_cleanly("sweep", *model[1:], "--reference", "digits", "--guidance", "2:1:1")
        assert "nothing to try" in refused_cleanly("sweep", *model[1:], "--reference", "digits")
        assert "NAME.safetensors" in refused_cleanly("statistics", "--data", "digits", "--out", out, "--protocol", "digits")
        assert "nothing.json" in refused_cleanly("compare", tmp_path / "nothing.json", tmp_path / "nothing.json")


class TestImport:
    def test_bad_input_leaves_nothing(self, refused_cleanly, tmp_path, out):
        broken = tmp_path / "broken.pt"
        torch.save({"model": {"a": torch.zeros(1000)}}, broken)
        foreign = shutil.copy(broken, tmp_path / "foreign.pt")
        cut(broken)
        assert "did you mean 'llamagen-vq16'?" in refused_cleanly("import", "llamagen-vq-16", foreign, "--out", out)
        assert "nothing.pt: no such file" in refused_cleanly("import", "llamagen-vq16", tmp_path / "nothing.pt", "--out", out)
        assert "broken.pt: not a readable weight file" in refused_cleanly("import", "llamagen-vq16", broken, "--out", out)
        assert "has no 'ema' weights; it holds model" in refused_cleanly(
            "import", "llamagen-vq16", foreign, "--out", out, "--weights", "ema"
        )
        assert "unexpected a 1000" in refused_cleanly("import", "llamagen-vq16", foreign, "--out", out)
        assert not out.exists()

    def test_another_jobs_results_stay(self, refused, model, tmp_path, out):
        before = contents(model)
        assert "already there" in refused("import", "llamagen-vq16", tmp_path / "x.pt", "--out", model)
        assert contents(model) == before
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        assert "already holds something" in refused("import", "llamagen-vq16", tmp_path / "x.pt", "--out", out)
        assert "file" in refused("import", "llamagen-vq16", tmp_path / "x.pt", "--out", tmp_path / "file")
        assert contents(out) == {"thesis.txt": b"mine"}


def test_demo_refuses_an_occupied_folder(refused, out):
    out.mkdir()
    (out / "results.json").write_text("{}")
    assert str(out) in refused("demo", "--out", out)
    (out / "results.json").rename(out / "thesis.txt")
    assert str(out) in refused("demo", "--out", out)
    assert contents(out) == {"thesis.txt": b"{}"}


def test_presets_of_a_wrong_name(refused):
    assert "did you mean 'llamagen-c2i-b-256'?" in refused("presets", "llamagen-c2i-b-265")
