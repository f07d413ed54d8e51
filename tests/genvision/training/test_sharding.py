"""Weights split over two processes (FSDP2 on gloo): the same training as one, for every model, and checkpoints that any number reads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from started_processes import GATHERED, SHARDED, finish, run, start
from training_examples import Runs, assert_equal_weights

from genvision.models.dit import DiT
from genvision.models.llamagen import LlamaGen
from genvision.training.saved_tensors import SavedTensors

LOOP = {"num_steps": 4, "batch_size": 8, "ema_decays": [0.9], "log_every": 2, "checkpoint_every": 2, "preview_every": 0}
# Adam makes full steps of gradients that are rounding alone; a large eps leaves them small
BASE = {"seed": 4, "optim": {"lr": 0.02, "eps": 1.0e-4, "weight_decay": 0.0}, "train": LOOP}
ON_CODES = BASE | {"stage": "generator"}
ON_PIXELS = ON_CODES | {
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "num_workers": 0},
    "sampler": {"num_steps": 2},
}
TOKENIZER = BASE | {"stage": "tokenizer", "data": {"spec": "digits", "image_size": 8, "num_workers": 0}}
SMALL = {"hidden_dim": 16, "depth": 2}
FLOW = {"name": "dit", **SMALL, "num_heads": 2, "patch_size": 2, "class_dropout": 0.2, "path": "linear", "prediction": "velocity"}
NO_DROPOUT = {"residual_dropout": 0.0, "mlp_dropout": 0.0, "attention_dropout": 0.0}
VQ = {"name": "vq", "codebook_size": 16, "codebook_dim": 4, "base_channels": 4, "encoder_multipliers": [1, 2], "num_res_blocks": 1}
VQ |= {"z_channels": 4, "norm_groups": 2}
SIDES = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("width", 8), ("depth", 2), ("heads", 2))}
TITOK = {f"{side}_{size}": value for side in ("encoder", "decoder") for size, value in (("dim", 8), ("depth", 2), ("heads", 2))}
GAN = {"discriminator": "stylegan", "width": 8, "r1_weight": 0.1, "adaptive": True}
MODELS = {
    "llamagen": ON_CODES
    | {
        "model": {
            "name": "llamagen",
            **SMALL,
            "num_heads": 2,
            "mlp_multiple_of": 8,
            "class_dropout": 0.0,
            "token_dropout": 0.0,
            **NO_DROPOUT,
        }
    },
    "rar": ON_CODES | {"model": {"name": "rar", **SMALL, "num_heads": 4, **NO_DROPOUT}},
    "maskgit": ON_CODES | {"model": {"name": "maskgit", **SMALL, "num_heads": 4, "mlp_multiple_of": 4, "dropout": 0.0}},
    "mage": ON_CODES
    | {"model": {"name": "mage", **SMALL, "num_heads": 4, "decoder_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4, "dropout": 0.0}},
    "flow": ON_PIXELS | {"model": FLOW},
    "guided flow": ON_PIXELS | {"model": FLOW, "loss": {"guidance": {"scale": 2.0, "start_step": 1, "drop_rate": 0.15}}},
    "vq": TOKENIZER | {"model": VQ, "loss": {"adversarial": GAN}},
    "moving vq": TOKENIZER | {"model": VQ | {"quantizer_options": {"update": "ema"}}, "loss": {"revive_every": 1}},
    "vitok": TOKENIZER | {"model": {"name": "vitok", "patch_size": 2, "code_width": 4, **SIDES}},
    "titok": TOKENIZER
    | {"model": {"name": "titok", "patch_size": 2, "num_latent_tokens": 4, "token_dim": 4, "codebook_size": 16, **TITOK}},
    "kl": TOKENIZER
    | {"model": {"name": "kl", "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}},
}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def on_codes(tiny_tokenizer, tiny_codes) -> dict:
    return {"tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{tiny_codes}"}}


def complete(config: dict, on_codes: dict) -> dict:
    return config if "data" in config else config | on_codes


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_with_split_weights_train_the_model_of_one(train, on_codes, name):
    config = complete(MODELS[name], on_codes)
    if config["stage"] == "generator":
        whole = train("whole", config)
    else:  # each process draws samples of a posterior for itself, and some terms are of a process's own images
        run(train.words("whole", config))
        whole = train.folder / "whole"
    run(train.words("split", config), environment=GATHERED)
    assert_equal_weights(whole, train.folder / "split", atol=2e-5)


def test_the_finished_model_and_the_gathered_checkpoint_are_those_of_the_split_weights(train, on_codes, tmp_path):
    config = complete(MODELS["llamagen"], on_codes)
    run(train.words("gathered", config), environment=GATHERED)
    run(train.words("split", config), environment=SHARDED)
    gathered, split = (tmp_path / name / f"checkpoints/step_{LOOP['num_steps']:08d}" for name in ("gathered", "split"))
    assert {path.name for path in split.glob("ema*")} == {f"ema_0.9.{rank:05d}-of-00002.safetensors" for rank in range(2)}
    for name in ("model", "optimizer", "ema_0.9"):
        whole, parts = load_file(gathered / f"{name}.safetensors"), SavedTensors(split, name)
        assert whole.keys() == parts.shapes.keys()
        for key, tensor in whole.items():
            assert torch.equal(parts.rows(key, 0, tensor.shape[0] if tensor.ndim else 1), tensor), key
    average = load_file(gathered / "ema_0.9.safetensors")
    for run_folder in (tmp_path / "gathered", tmp_path / "split"):
        model = LlamaGen.from_pretrained(run_folder / "model/generator")
        assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("environment", [{}, SHARDED, GATHERED], ids=["whole", "split", "gathered"])
def test_a_run_moves_to_another_number_of_processes(train, on_codes, environment):
    """Two, then one, then three split ones, then one again: the samples and their order stay, so the weights agree to rounding."""
    config = complete(MODELS["flow"], on_codes) | {"train": LOOP | {"num_steps": 8, "batch_size": 12}}
    one = train("one", config)
    run(train.words("moved", config, "--train.num_steps", 2), environment=environment)
    train("moved", config, "--train.num_steps", 4)
    run(train.words("moved", config, "--train.num_steps", 6), num=3, environment=environment or SHARDED)
    assert_equal_weights(one, train("moved", config), atol=2e-5)


@pytest.mark.parametrize("name", ["flow", "vq"])
def test_split_runs_go_on_bit_for_bit(train, on_codes, name, tmp_path):
    config = complete(MODELS[name], on_codes)
    run(train.words("undisturbed", config), environment=SHARDED)
    run(train.words("stopped", config, "--train.num_steps", 2), environment=SHARDED)
    run(train.words("stopped", config), environment=SHARDED)
    folders = [tmp_path / run_name / f"checkpoints/step_{LOOP['num_steps']:08d}" for run_name in ("undisturbed", "stopped")]
    for path in folders[0].glob("*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_adapters_previews_validation_and_scores_work_on_split_weights(train):
    """Two processes with split weights say and draw what one does."""
    loop = LOOP | {"preview_every": 4, "validate_every": 4, "validate_num": 32}
    scores = {"every": 4, "num": 20, "extractor": "digits", "reference": "digits"}
    data = ON_PIXELS["data"] | {"validation": "digits:second", "spec": "digits:first"}
    config = MODELS["flow"] | {"train": loop, "scores": scores, "data": data, "lora": {"rank": 2, "also_train": ["norms"]}}
    config["model"] = FLOW | {"norm": "rms"}
    one = train("one", config)
    run(train.words("split", config), environment=SHARDED)
    told = [
        {name: value for line in (folder / "metrics.jsonl").read_text().splitlines() for name, value in json.loads(line).items()}
        for folder in (one, train.folder / "split")
    ]
    for name in ("validation_loss", "online_fid", "loss"):
        assert told[1][name] == pytest.approx(told[0][name], rel=1e-3), name
    pictures = [np.asarray(Image.open(folder / "previews/step_00000004.png")).astype(int) for folder in (one, train.folder / "split")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    plain = DiT.from_pretrained(train.folder / "split/model/generator")
    assert not any("lora" in name for name in plain.state_dict())


def test_low_precision_is_of_the_passes_alone(train, on_codes):
    config = complete(MODELS["llamagen"], on_codes)
    run(train.words("split", config, "--train.precision", "bf16", "--train.num_steps", 2), environment=GATHERED)
    run(train.words("whole", config, "--train.precision", "bf16", "--train.num_steps", 2))
    split, whole = (load_file(train.folder / name / "checkpoints/step_00000002/model.safetensors") for name in ("split", "whole"))
    assert all(tensor.dtype == torch.float32 for tensor in split.values())
    assert max(float((split[name] - whole[name]).abs().max()) for name in whole) < 0.02


def test_checkpointed_blocks_are_gathered_again_for_the_backward_pass(train, on_codes):
    config = complete(MODELS["llamagen"], on_codes)
    run(train.words("plain", config), environment=GATHERED)
    for policy in ("block", "sqrt"):
        run(train.words(policy, config, "--train.gradient_checkpointing", policy), environment=GATHERED)
        assert_equal_weights(train.folder / "plain", train.folder / policy, atol=0)


def test_the_first_version_is_refused(train, on_codes, tmp_path):
    words = train.words("run", complete(MODELS["llamagen"], on_codes))
    assert 2 in finish(start(words, environment=SHARDED | {"FSDP_VERSION": "1"}, errors=tmp_path / "stderr"))
    assert "set fsdp_version to 2" in (tmp_path / "stderr.0").read_text()
