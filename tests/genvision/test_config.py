"""YAML and command line become dataclasses; what is wrong is named by file, key and the nearest right name."""

from pathlib import Path
from typing import Literal

import pytest
import yaml

from genvision.config import MODELS, flat_values, load_train_config, recipe_path, run_command, save_config, shipped_recipes
from genvision.errors import UserError

BASE = {
    "stage": "tokenizer",
    "output_dir": "runs/x",
    "data": {"spec": "digits", "image_size": 8},
    "model": {"name": "vq", "codebook_size": 16},
    "train": {"num_steps": 10},
}
GENERATOR = {
    "stage": "generator",
    "output_dir": "runs/x",
    "data": {"spec": "digits"},
    "model": {"name": "llamagen"},
    "train": {"num_steps": 1},
}


@pytest.fixture
def write(tmp_path):
    """Write a YAML file from a mapping or a text; returns its path."""

    def write(content: dict | str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def load(*words: str):
    return load_train_config(["--config", *words])[0]


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_train_config(list(words))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def changed(section: str, **values) -> dict:
    return BASE | {section: BASE.get(section, {}) | values}


class TestValues:
    def test_what_the_file_leaves_out_has_the_default(self, write):
        config = load(write(BASE))
        assert (config.stage, config.seed, config.data.spec, config.data.image_size) == ("tokenizer", 0, "digits", 8)
        assert (config.model["name"], config.model["codebook_size"], config.model["codebook_dim"]) == ("vq", 16, 8)
        assert config.optim.betas == (0.9, 0.95)
        assert config.tokenizer is None and config.sampler == {}
        assert config.loss["reconstruction"] == "l2"

    def test_the_command_line_wins_over_the_file(self, write):
        file = write(changed("optim", lr=0.5))
        assert load(file).optim.lr == 0.5
        assert load(file, "--optim.lr", "0.25").optim.lr == 0.25
        assert load(file, "--optim.lr=0.125").optim.lr == 0.125
        assert load_train_config(["--optim.lr", "0.25", "--config", file])[0].optim.lr == 0.25
        assert load(file, "--train.ema_decays", "[0.9, 0.99]").train.ema_decays == (0.9, 0.99)
        assert load(file, "--model.encoder_multipliers", "[1,2]").model["encoder_multipliers"] == (1, 2)
        assert load(file, "--data.image_size", "null").data.image_size is None

    def test_numbers_may_be_written_with_an_exponent(self, write):
        # YAML 1.1 reads 1e-3 as a text
        assert load(write("optim: {lr: 1e-3}\n" + yaml.safe_dump(BASE))).optim.lr == 1e-3
        assert load(write(BASE), "--optim.lr", "3e-4").optim.lr == 3e-4

    def test_one_file_is_enough(self, write):
        file = write(BASE)
        assert "given twice" in refusal("--config", file, f"--config={file}")

    def test_an_empty_section_is_no_mistake(self, write):
        assert load(write(BASE | {"loss": {}})) == load(write(BASE))

    def test_changes_that_are_allowed_are_no_part_of_the_configuration(self, write):
        file = write(BASE)
        words = ["--config", file, "--allow-change", "optim.lr,data", "--allow-change=train.batch_size"]
        (plain, none), (allowing, keys) = load_train_config(["--config", file]), load_train_config(words)
        assert plain == allowing
        assert not none and keys == {"optim.lr", "data", "train.batch_size"}
        assert "did you mean 'optim.lr'" in refusal("--config", file, "--allow-change", "optim.lrr")
        assert "a key is expected" in refusal("--config", file, "--allow-change")

    def test_the_model_on_the_command_line_needs_no_file(self):
        words = ["--stage", "tokenizer", "--output_dir", "x", "--model.name", "vq", "--data.spec", "digits", "--train.num_steps", "3"]
        assert load_train_config(words)[0].train.num_steps == 3

    @pytest.mark.parametrize("content", [BASE, GENERATOR], ids=["tokenizer", "generator"])
    def test_a_saved_configuration_loads_to_an_equal_one(self, write, tmp_path, content):
        config = load(write(content), "--optim.lr", "0.1", "--train.ema_decays", "[]", "--seed", "7")
        save_config(config, tmp_path / "below" / "config.yaml")
        assert load(str(tmp_path / "below" / "config.yaml")) == config
        saved = flat_values(yaml.safe_load((tmp_path / "below" / "config.yaml").read_text()))
        assert saved == flat_values(config)
        assert saved["optim.lr"] == 0.1 and saved["train.ema_decays"] == []

    def test_what_follows_from_the_data_is_no_option(self, write):
        assert "model.image_size" in refusal("--config", write(BASE), "--model.image_size", "8")
        assert "model.codebook_size" in refusal("--config", write(GENERATOR), "--model.codebook_size", "8")
        assert load(write(GENERATOR)).model["num_classes"] is None


class TestMistakesInTheFile:
    @pytest.mark.parametrize(
        ("content", "key", "nearest"),
        [
            (BASE | {"sed": 1}, "sed", "seed"),
            (BASE | {"outputdir": "x"}, "outputdir", "output_dir"),
            (changed("train", num_step=1), "train.num_step", "train.num_steps"),
            (changed("optim", learning_rate=1), "optim.learning_rate", None),
            (changed("model", codebok_size=1), "model.codebok_size", "model.codebook_size"),
            (changed("loss", revive_evry=1), "loss.revive_evry", "loss.revive_every"),
            (BASE | {"trian": {"num_steps": 1}}, "trian.num_steps", "train.num_steps"),
            (BASE | {"sampler": {"top_k": 3}}, "sampler.top_k", None),
        ],
    )
    def test_an_unknown_key_is_named_with_the_nearest(self, write, content, key, nearest):
        file = write(content)
        message = refusal("--config", file)
        assert message.startswith(f"{file}: unknown key '{key}'")
        assert nearest is None or message.endswith(f"did you mean '{nearest}'?")

    @pytest.mark.parametrize(
        ("content", "key", "value"),
        [
            (changed("optim", lr="fast"), "optim.lr", "fast"),
            (changed("train", batch_size=2.5), "train.batch_size", "2.5"),
            (changed("train", compile="perhaps"), "train.compile", "perhaps"),
            (changed("optim", betas=[0.9]), "optim.betas", "0.9"),
            (changed("data", crop="middle"), "data.crop", "middle"),
            (changed("model", codebook_size="many"), "model.codebook_size", "many"),
            (BASE | {"seed": "one"}, "seed", "one"),
            (BASE | {"stage": "generator"}, "stage", "generator"),
        ],
    )
    def test_a_value_of_a_wrong_type_is_named(self, write, content, key, value):
        file = write(content)
        message = refusal("--config", file)
        assert message.startswith(f"{file}: {key}") and value in message
        assert "<class" not in message and "Traceback" not in message

    @pytest.mark.parametrize(
        ("content", "key"),
        [
            (changed("train", num_steps=0), "train.num_steps"),
            (changed("train", num_steps=-5), "train.num_steps"),
            (changed("train", batch_size=0), "train.batch_size"),
            (changed("train", preview_every=-1), "train.preview_every"),
            (changed("train", ema_decays=[1.0]), "train.ema_decays"),
            (changed("optim", lr=-1.0), "optim.lr"),
            (changed("optim", betas=[0.9, 1.0]), "optim.betas"),
            (changed("optim", max_grad_norm=0.0), "optim.max_grad_norm"),
            (changed("data", num_workers=-1), "data.num_workers"),
            (changed("data", crop="resized", min_area=0.0), "data.min_area"),
            (changed("data", min_area=0.5), "data.min_area"),  # of a centre crop
            (BASE | {"seed": -1}, "seed"),
        ],
    )
    def test_an_impossible_number_is_named(self, write, content, key):
        file = write(content)
        assert refusal("--config", file).startswith(f"{file}: {key} ")

    def test_missing_keys_are_named(self, write):
        file = write({"model": {"name": "vq"}, "data": {"image_size": 8}})
        message = refusal("--config", file)
        assert message.startswith(f"{file}: ")
        assert all(key in message for key in ("stage", "output_dir", "data.spec", "train.num_steps")) and "must be given" in message

    def test_an_unknown_model_is_named_with_the_known(self, write):
        message = refusal("--config", write(BASE | {"model": {"name": "lamagen"}}))
        assert "'lamagen'" in message and all(name in message for name in MODELS) and message.endswith("did you mean 'llamagen'?")
        assert "model.name is None" in refusal("--config", write({"stage": "tokenizer"}))

    @pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t", "\x00"])
    def test_invalid_yaml_is_named(self, write, text):
        file = write(text)
        assert refusal("--config", file).startswith(f"{file}: not valid YAML")

    @pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "5"])
    def test_yaml_without_keys_is_named(self, write, text):
        file = write(text)
        assert refusal("--config", file).startswith(f"{file}: holds no keys")

    @pytest.mark.parametrize("section", ["train", "data", "model", "optim"])
    def test_a_section_that_is_no_mapping_is_named(self, write, section):
        file = write(BASE | {section: 5})
        message = refusal("--config", file)
        assert message.startswith(f"{file}: ") and section in message

    def test_a_file_of_other_bytes_is_named(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
        assert "x.yaml: not valid YAML" in refusal("--config", str(tmp_path / "x.yaml"))


class TestMistakesOnTheCommandLine:
    def test_an_unknown_key_is_named_without_the_file(self, write):
        file = write(BASE)
        assert refusal("--config", file, "--train.num_step", "3") == "unknown key 'train.num_step'; did you mean 'train.num_steps'?"
        assert refusal("--config", file, "--train.num_step=3") == "unknown key 'train.num_step'; did you mean 'train.num_steps'?"

    @pytest.mark.parametrize(("key", "value"), [("optim.lr", "fast"), ("train.batch_size", "2.5"), ("data.crop", "middle"), ("seed", "-1")])
    def test_a_wrong_value_is_named_without_the_file(self, write, key, value):
        message = refusal("--config", write(BASE), f"--{key}", value)
        assert message.startswith(key) and value in message

    def test_a_forgotten_value_is_named(self, write):
        assert "train.num_steps" in refusal("--config", write(BASE), "--train.num_steps")
        assert refusal("--config") == "--config: a YAML file is expected behind it"

    def test_a_stray_word_is_named(self, write):
        assert refusal("--config", write(BASE), "stray") == "unrecognized arguments: stray"

    def test_a_missing_file_is_named(self, tmp_path):
        assert refusal("--config", str(tmp_path / "x.yaml")).startswith(f"{tmp_path / 'x.yaml'}: no such file")
        assert refusal("--config", str(tmp_path)).startswith(f"{tmp_path}: no such file")


class TestRecipes:
    def test_shipped_recipes_are_found_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert shipped_recipes()
        for name in shipped_recipes():
            assert recipe_path(name).is_file()
            assert recipe_path(f"configs/{name}") == recipe_path(name)
            assert load(name) == load(f"configs/{name}")

    def test_a_file_of_ones_own_comes_first(self, tmp_path, monkeypatch, write):
        monkeypatch.chdir(tmp_path)
        name = shipped_recipes()[0]
        Path(name).parent.mkdir()
        Path(write(BASE)).rename(name)
        assert recipe_path(name) == Path(name)
        assert load(name).output_dir == "runs/x"


class TestRunCommand:
    def call(self, *words: str) -> dict:
        """What a function with every kind of parameter is called with."""
        seen = {}

        def paint(name: str, times: int = 1, *, out_dir: Path, on_bad_image: Literal["stop", "skip"] = "stop", flip: bool = False) -> None:
            """Paint a picture.

            Args:
                name: of the picture.
                out_dir: where it goes.
            """
            seen.update(locals())

        run_command("paint", paint, words)
        return {key: value for key, value in seen.items() if key != "seen"}

    def refusal(self, *words: str) -> str:
        with pytest.raises(UserError) as caught:
            self.call(*words)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_arguments_arrive_with_their_types(self):
        default = {"name": "cat", "times": 1, "out_dir": Path("x"), "on_bad_image": "stop", "flip": False}
        assert self.call("cat", "--out-dir", "x") == default
        everything = ["--flip", "--on-bad-image", "skip", "cat", "3", "--out-dir=x"]
        assert self.call(*everything) == default | {"times": 3, "on_bad_image": "skip", "flip": True}

    def test_a_text_that_looks_like_a_number_stays_a_text(self):
        assert self.call("207", "--out-dir", "3.0")["name"] == "207"
        assert self.call("null", "--out-dir", "3.0")["out_dir"] == Path("3.0")

    def test_mistakes_are_named(self):
        assert self.refusal("cat", "--out-dri", "x", "--out-dir", "y").endswith("did you mean '--out-dir'?")
        assert self.refusal("cat") == "paint: --out-dir must be given"
        assert self.refusal("--out-dir", "x") == "paint: name must be given"
        assert "times" in self.refusal("cat", "often", "--out-dir", "x")
        assert "--on-bad-image" in self.refusal("cat", "--out-dir", "x", "--on-bad-image", "cry")
        assert "extra" in self.refusal("cat", "1", "extra", "--out-dir", "x")
        assert "--out-dir" in self.refusal("cat", "--out-dir")

    def test_help_comes_from_the_docstring(self, capsys):
        with pytest.raises(SystemExit) as exit:
            self.call("--help")
        assert exit.value.code == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in ("genvision paint", "Paint a picture.", "of the picture.", "--out-dir", "where it goes."))
