"""One thread for every test (two contended threads make small matrix products many times slower), and one tiny trained model."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels are interpreted, on CPU tensors; this must be known before Triton is imported. `make test-gpu` says otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from started_processes import run

torch.set_num_threads(1)

TINY_TOKENIZER = {
    "stage": "tokenizer",
    "data": {"spec": "digits", "image_size": 8, "flip": False, "num_workers": 0},
    "model": {
        "name": "vq",
        "codebook_size": 16,
        "codebook_dim": 4,
        "base_channels": 4,
        "encoder_multipliers": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 4,
        "norm_groups": 2,
    },
    "train": {"num_steps": 3, "batch_size": 16, "ema_decays": [], "preview_every": 0},
}
TINY_MODEL = {
    "stage": "generator",
    "model": {"name": "llamagen", "hidden_dim": 32, "depth": 1, "num_heads": 2, "mlp_multiple_of": 8, "class_dropout": 0.5},
    "optim": {"lr": 0.01},
    "train": {"num_steps": 3, "batch_size": 16, "ema_decays": [], "checkpoint_every": 2, "preview_every": 0},
}
TINY_DIT = {
    "stage": "generator",
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "flip": False, "num_workers": 0},
    "model": {"name": "dit", "hidden_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "class_dropout": 0.2},
    "optim": {"lr": 0.01, "weight_decay": 0.0},
    "train": {"num_steps": 20, "batch_size": 32, "ema_decays": [], "checkpoint_every": 10, "preview_every": 0},
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Statistics of references go into a folder of this test run, never into the user's."""
    os.environ["GENVISION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a VQ tokenizer for 8 x 8 digits, 4 x 4 tokens of 16 codes; trained for three steps."""
    return _trained(tmp_path_factory.mktemp("vq"), TINY_TOKENIZER)


@pytest.fixture(scope="session")
def tiny_codes(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as codes of `tiny_tokenizer`."""
    from genvision.jobs.encode import encode_data

    folder = tmp_path_factory.mktemp("codes") / "digits"
    encode_data(tiny_tokenizer, "digits", folder, batch_size=256)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_tokenizer: Path, tiny_codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the training run (config.yaml, checkpoints, model) of a LlamaGen on `tiny_codes`."""
    folder = tmp_path_factory.mktemp("llamagen")
    return _trained(folder, {"tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{tiny_codes}"}} | TINY_MODEL).parent


@pytest.fixture(scope="session")
def tiny_model(tiny_run: Path) -> Path:
    """The finished pipeline folder of `tiny_run`. Tests copy it before they change it."""
    return tiny_run / "model"


@pytest.fixture(scope="session")
def tiny_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pipeline of a flow transformer on 8 x 8 digits, grey pixels as they are, Euler in 6 steps; trained for 20 steps."""
    return _trained_dit(tmp_path_factory.mktemp("flow"), path="linear", prediction="velocity")


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a discrete diffusion with a learned variance, DDPM in 6 steps."""
    return _trained_dit(tmp_path_factory.mktemp("diffusion"), path="ddpm", learn_sigma=True)


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[..., None]:
    """Runs a command of genvision as two processes that know of one another, as torchrun starts them."""
    return lambda *words: run(words)


def _trained_dit(folder: Path, **model: object) -> Path:
    return _trained(folder, TINY_DIT | {"model": TINY_DIT["model"] | model, "sampler": {"num_steps": 6}})


def _trained(folder: Path, config: dict) -> Path:
    from genvision.config import load_train_config
    from genvision.jobs.train import run_training

    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    resolved, _ = load_train_config(["--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run")])
    model = run_training(resolved)
    assert model is not None
    return model
