"""Generators of masked tokens and of tokens in random orders in training: how a batch is split and where a run stops does not matter."""

import json
from pathlib import Path

import pytest
from training_examples import Runs, assert_equal_weights, assert_same_run, largest_difference

from genvision.errors import UserError
from genvision.jobs.encode import encode_data
from genvision.pipeline import ImagePipeline
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, TrainConfig

BASE = {
    "stage": "generator",
    "seed": 4,
    # Adam makes full steps of gradients that are rounding alone; a large eps leaves them small
    "optim": {"lr": 0.02, "eps": 1.0e-5},
    "train": {"num_steps": 8, "batch_size": 8, "ema_decays": [0.9], "log_every": 4, "checkpoint_every": 3, "preview_every": 0},
}
SMALL = {"hidden_dim": 16, "num_heads": 4, "class_dropout": 0.3}
MASKGIT = BASE | {
    "model": {"name": "maskgit", **SMALL, "depth": 2, "mlp_multiple_of": 4, "dropout": 0.0},
    "loss": {"mask_law": "arccos", "reduction": "sample"},
    "sampler": {"num_steps": 4},
}
MAGE = BASE | {
    "model": {
        "name": "mage",
        **SMALL,
        "depth": 1,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 4,
        "dropout": 0.0,
    },
    "loss": {"mask_law": "truncated_normal", "min_ratio": 0.5, "drop_ratio": 0.5, "reduction": "batch"},
    "sampler": {"num_steps": 4},
}
RAR = BASE | {
    "model": {"name": "rar", **SMALL, "depth": 1, "attention_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0},
    "loss": {"anneal_start": 2, "anneal_end": 7},
}
NESTED = MASKGIT | {"loss": MASKGIT["loss"] | {"nested": [2, 4]}}
CONTRASTIVE = MAGE | {
    "model": MAGE["model"] | {"class_dropout": 1.0, "contrastive_dim": 8},
    "loss": MAGE["loss"] | {"contrastive_weight": 0.1},
    "data": {"spec": "digits", "image_size": 8, "views": 2, "num_workers": 0},
}
FAMILIES = {"maskgit": MASKGIT, "mage": MAGE, "rar": RAR}
LONG = {"num_steps": 20}
DROPOUT = {
    "maskgit": {"dropout": 0.1},
    "mage": {"dropout": 0.1},
    "rar": {"attention_dropout": 0.1, "residual_dropout": 0.1, "mlp_dropout": 0.1},
}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def on_codes(tiny_tokenizer, tiny_codes) -> dict:
    """What is trained on: 4 x 4 tokens of 16 codes."""
    return {"tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{tiny_codes}"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, on_codes) -> dict[str, Path]:
    """An undisturbed run of each family, without dropout."""
    train = Runs(tmp_path_factory.mktemp("whole"))
    return {name: train(name, config | on_codes) for name, config in FAMILIES.items()}


def with_dropout(config: dict) -> dict:
    return config | {"model": config["model"] | DROPOUT[config["model"]["name"]]}


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_parts_train_the_model_of_the_whole_batch(train, on_codes, whole, family):
    parts = train("parts", FAMILIES[family] | on_codes, "--train.accumulation", 4)
    assert_equal_weights(whole[family], parts)


@pytest.mark.parametrize("family", ["maskgit", "mage"])
def test_two_processes_train_the_same_model_as_one(train, in_two_processes, on_codes, whole, family):
    in_two_processes(*train.words("two", FAMILIES[family] | on_codes, "--train.accumulation", 2))
    assert_equal_weights(whole[family], train.folder / "two")
    assert (train.folder / "two/checkpoints/step_00000008/rng_1.pt").is_file()


@pytest.mark.parametrize(
    ("family", "change"),
    [("maskgit", ["--loss.mask_law", "linear"]), ("mage", ["--loss.ratio_mean", 0.9]), ("rar", ["--loss.anneal_end", 3])],
)
def test_what_is_drawn_there_matters(train, on_codes, whole, family, change):
    """Or the tests above would say nothing of masks and orders."""
    assert largest_difference(whole[family], train("other", FAMILIES[family] | on_codes, *change)) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_stops_goes_on_bit_for_bit(train, on_codes, family):
    config = with_dropout(FAMILIES[family]) | on_codes
    whole = train("whole", config)
    train("stopped", config, "--train.num_steps", 4)
    assert_same_run(whole, train("stopped", config))


def test_a_killed_run_goes_on_bit_for_bit(train, on_codes):
    config = with_dropout(MAGE) | on_codes | {"train": MAGE["train"] | LONG}
    assert_same_run(train("whole", config), train.killed("killed", config, 6))


def test_nested_networks_that_learn_from_the_whole_one_go_on_bit_for_bit(train, on_codes):
    """How much they learn from it depends on how much of the run is done."""
    config = with_dropout(NESTED) | on_codes | {"train": NESTED["train"] | LONG}
    whole = train("whole", config)
    assert_same_run(whole, train.killed("killed", config, 6))
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    from_labels = (last["loss_p1"] + last["loss_p2"] + last["loss_p4"]) / 3
    assert abs(last["loss"] - from_labels) > 1e-3


class TestTwoViews:
    """MAGE-C."""

    @pytest.fixture
    def config(self, tiny_tokenizer) -> dict:
        return CONTRASTIVE | {"tokenizer": str(tiny_tokenizer)}

    def test_images_are_trained_on_and_a_run_goes_on_bit_for_bit(self, train, config):
        words = ["--data.crop", "random", "--train.log_every", 1, "--train.num_steps"]
        whole = train("whole", config, *words, 2)
        for line in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()):
            assert line["loss"] == pytest.approx(line["reconstruction"] + 0.1 * line["contrastive"], rel=1e-4)
            assert line["contrastive"] > 0
        train("stopped", config, *words, 1)
        assert_same_run(whole, train("stopped", config, *words, 2))
        pipeline = ImagePipeline.from_pretrained(whole / "model")
        assert pipeline.label_names == ["image"]  # labels are never shown
        assert pipeline([0, 0], output_type="np").images.shape == (2, 8, 8, 3)

    def test_an_encoded_set_with_flips_trains_like_the_images_themselves(self, train, config, tmp_path):
        encode_data(config["tokenizer"], "digits", tmp_path / "codes", batch_size=256, flip=True)
        encoded = train("encoded", config | {"data": {"spec": f"encoded:{tmp_path / 'codes'}", "views": 2}})
        assert_equal_weights(encoded, train("images", config))

    def test_what_has_no_two_views_is_refused(self, train, config, on_codes):
        message = train.refused(config | {"data": on_codes["data"] | {"views": 2}})
        assert on_codes["data"]["spec"].removeprefix("encoded:") in message
        assert "data.views 2" in message and "encode again with --flip or --crops ten" in message
        assert "set data.crop to random, or data.flip to true" in train.refused(config, "--data.flip", "false")

    def test_views_and_a_loss_that_compares_them_go_together(self, train, config):
        assert "set data.views to 2" in train.refused(config, "--data.views", 1)
        message = train.refused(config, "--loss.contrastive_weight", 0, "--model.contrastive_dim", 0)
        assert "data.views 2" in message and "set loss.contrastive_weight" in message

    def test_other_uses_of_images_have_one_view(self):
        with pytest.raises(UserError, match=r"data\.posterior sample is for dit") as posterior:
            DataConfig(spec="digits", views=2, posterior="sample")
        with pytest.raises(UserError, match=r"data\.features dinov2_vitb14 is for dit") as features:
            DataConfig(spec="digits", views=2, features="dinov2_vitb14")
        parts = {"optim": OptimConfig(), "train": LoopConfig(num_steps=1)}
        with pytest.raises(UserError, match=r"leave it at 1 for a tokenizer") as stage:
            TrainConfig(stage="tokenizer", output_dir="runs", model={"name": "vq"}, data=DataConfig(spec="digits", views=2), **parts)
        for error in (posterior, features, stage):
            assert str(error.value).startswith("data.views 2: ") and "\n" not in str(error.value)
