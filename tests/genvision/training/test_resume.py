"""Real training processes, really killed: what comes out must be bit for bit what an undisturbed run makes."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from genvision.cli import main
from genvision.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
STEPS = 40

TOKENIZER = {
    "stage": "tokenizer",
    "seed": 3,
    "data": {"spec": "digits", "image_size": 8, "flip": True, "num_workers": 0},
    "model": {
        "name": "vq",
        "codebook_size": 16,
        "codebook_dim": 4,
        "base_channels": 4,
        "encoder_multipliers": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 4,
        "norm_groups": 2,
        "dropout": 0.1,
        "entropy_weight": 0.01,
    },
    "loss": {"revive_every": 7},
    "optim": {"lr": 2.0e-3, "warmup_steps": 5, "schedule": "cosine"},
    "train": {"num_steps": STEPS, "batch_size": 8, "ema_decays": [0.9, 0.5], "log_every": 5, "checkpoint_every": 3, "preview_every": 0},
}
ADVERSARY = {"width": 4, "num_layers": 1, "adaptive": True, "start": 6, "ramp": 10, "lecam_weight": 0.1, "r1_weight": 0.1, "lr": 1.0e-3}
ADVERSARIAL = TOKENIZER | {"loss": {"adversarial": {"discriminator": "patchgan", **ADVERSARY}}}
GENERATOR = {
    "stage": "generator",
    "seed": 4,
    "data": {"spec": "digits", "num_workers": 1},
    "model": {"name": "llamagen", "hidden_dim": 16, "depth": 2, "num_heads": 2, "mlp_multiple_of": 8},
    "optim": {"lr": 1.0e-3},
    "train": {
        "num_steps": STEPS,
        "batch_size": 8,
        "accumulation": 2,
        "ema_decays": [0.9],
        "log_every": 5,
        "checkpoint_every": 4,
        "preview_every": 10,
    },
}

PIXELS = {
    "stage": "generator",
    "seed": 5,
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "flip": True, "num_workers": 0},
    "optim": {"lr": 0.01, "warmup_steps": 5, "schedule": "cosine"},
    "train": {"num_steps": STEPS, "batch_size": 8, "accumulation": 2, "log_every": 5, "checkpoint_every": 3, "preview_every": 0},
    "sampler": {"num_steps": 2},
}
SMALL_DIT = {"name": "dit", "hidden_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "class_dropout": 0.2}
FLOW_DIT = SMALL_DIT | {"path": "linear", "prediction": "velocity"}
GUIDANCE = {"guidance": {"scale": 2.0, "start_step": 10, "drop_rate": 0.15}}
DIFFUSION_RUNS = {
    "flow": PIXELS | {"model": FLOW_DIT},
    "diffusion": PIXELS | {"model": SMALL_DIT | {"path": "ddpm", "learn_sigma": True}},
    # whose target is made with the average of the weights
    "guided": PIXELS | {"model": FLOW_DIT, "loss": GUIDANCE},
    "guided automatically": PIXELS
    | {
        "model": FLOW_DIT,
        "loss": {"guidance": GUIDANCE["guidance"] | {"auto_every": 13, "auto_rate": 0.5, "auto_num": 20, "auto_extractor": "digits"}},
    },
}


def start(config: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", str(config), "--output_dir", str(output), *more]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def newest_step(output: Path) -> int:
    return max((int(path.name[5:13]) for path in (output / "checkpoints").glob("step_????????")), default=0)


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while newest_step(output) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_run(a: Path, b: Path) -> None:
    """Model, averages and optimiser state of the last checkpoint, and the finished model, bit for bit."""
    last = f"checkpoints/step_{STEPS:08d}"
    for name in [path.name for path in (a / last).glob("*.safetensors")]:
        left, right = load_file(a / last / name), load_file(b / last / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].equal(right[key]), (name, key)
    for name in [path.name for path in (a / last).glob("*.pt")]:
        assert (a / last / name).read_bytes() == (b / last / name).read_bytes(), name
    for path in (a / "model").rglob("*.safetensors"):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration of the tokenizer stage, and an undisturbed run of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(TOKENIZER))
    finish(start(config, folder / "whole"))
    return config, folder / "whole"


def test_three_kills_at_random_moments_change_no_bit(tokenizer_run, tmp_path):
    config, whole = tokenizer_run
    output = tmp_path / "killed"
    moments = random.Random(0)
    for target in (3, 15, 27):
        process = start(config, output)
        wait_for_step(process, output, target)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert target <= newest_step(output) < STEPS
    finish(start(config, output))
    assert_same_run(whole, output)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [yaml.safe_load(line)["step"] for line in lines] == list(range(5, STEPS + 1, 5))


def test_a_run_from_before_an_option_existed_goes_on_if_it_has_its_default(tokenizer_run, tmp_path):
    config, whole = tokenizer_run
    output = shutil.copytree(whole, tmp_path / "old")
    shutil.rmtree(output / f"checkpoints/step_{STEPS:08d}")
    saved = yaml.safe_load((output / "config.yaml").read_text())
    saved["output_dir"] = str(output)
    for key in ("data.views", "data.min_area", "train.ema_warmup", "loss.adversarial", "model.patch_size"):
        section, option = key.split(".")
        del saved[section][option]
    (output / "config.yaml").write_text(yaml.safe_dump(saved))
    words = ["train", "--debug", "--config", str(config), "--output_dir", str(output)]
    with pytest.raises(UserError, match=r"config\.yaml: the run was started with train\.ema_warmup True, now it is False; give the old"):
        main([*words, "--train.ema_warmup", "false"])
    with pytest.raises(UserError, match=r"started with loss\.adversarial\.weight 0\.5, now it is 0\.1; give"):
        main([*words, "--loss.adversarial.weight", "0.1"])
    main(words)
    assert_same_run(whole, output)
    assert yaml.safe_load((output / "config.yaml").read_text())["data"]["views"] == 1


def test_a_tokenizer_on_resized_crops_goes_on_bit_for_bit_and_their_least_area_matters(tmp_path):
    config = tmp_path / "config.yaml"
    data = TOKENIZER["data"] | {"crop": "resized", "min_area": 0.5}
    config.write_text(yaml.safe_dump(TOKENIZER | {"data": data, "loss": {}, "optim": {"lr": 2.0e-3}}))

    def run(name: str, steps: int, *more: str) -> bytes:
        main(["train", "--config", str(config), "--output_dir", str(tmp_path / name), "--train.num_steps", str(steps), *more])
        return (tmp_path / name / f"checkpoints/step_{steps:08d}/model.safetensors").read_bytes()

    whole = run("whole", 4)
    run("stopped", 2)
    assert run("stopped", 4) == whole
    assert run("other", 4, "--data.min_area", "0.9") != whole


def test_an_adversarial_run_goes_on_bit_for_bit(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(ADVERSARIAL))
    finish(start(config, tmp_path / "whole"))
    process = start(config, tmp_path / "killed")
    wait_for_step(process, tmp_path / "killed", 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert newest_step(tmp_path / "killed") < STEPS
    finish(start(config, tmp_path / "killed"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    saved = {path.name for path in (tmp_path / "whole/checkpoints" / f"step_{STEPS:08d}").iterdir()}
    assert {"adversary.safetensors", "adversary_optimizer.safetensors"} <= saved


def test_a_generator_on_images_is_stopped_by_sigterm_and_goes_on(tokenizer_run, tmp_path):
    tokenizer = tokenizer_run[1] / "model"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(GENERATOR | {"tokenizer": str(tokenizer)}))
    finish(start(config, tmp_path / "whole"))
    process = start(config, tmp_path / "stopped")
    wait_for_step(process, tmp_path / "stopped", 8)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again to go on" in finish(process)
    stopped_at = newest_step(tmp_path / "stopped")
    assert 8 <= stopped_at < STEPS and not (tmp_path / "stopped" / "model").exists()
    finish(start(config, tmp_path / "stopped"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert len(list((tmp_path / "whole" / "previews").glob("*.png"))) == 4


@pytest.mark.parametrize("kind", DIFFUSION_RUNS)
def test_a_diffusion_transformer_goes_on_bit_for_bit(kind, tmp_path):
    """The killed process is a fork of this one, which has loaded torch already."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(DIFFUSION_RUNS[kind]))
    words = ["train", "--config", str(config), "--output_dir"]
    main([*words, str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=main, args=([*words, str(killed)],))
    process.start()
    deadline = time.monotonic() + 120
    while newest_step(killed) < 15:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and newest_step(killed) < STEPS
    main([*words, str(killed)])
    assert_same_run(tmp_path / "whole", killed)
    if "guided" in kind:
        lines = [yaml.safe_load(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
        assert "auto" not in kind or 1 < lines[-1]["guidance_scale"] < 2


@pytest.mark.parametrize("adversarial", [False, True])
def test_two_processes_train_the_same_model_as_one(adversarial, tmp_path):
    config = tmp_path / "config.yaml"
    # a discriminator without BatchNorm, which would see half of the batch; and no weight that each process finds for itself
    adversary = {"discriminator": "stylegan", "width": 8, "r1_weight": 0.1}
    config.write_text(yaml.safe_dump(TOKENIZER | {"loss": {"adversarial": adversary} if adversarial else {}}))
    # what depends on more than one image (entropy over a batch, revived codes) or on each process's own dropout is switched off
    changes = ["--train.num_steps", "6", "--model.dropout", "0", "--model.entropy_weight", "0"]
    finish(start(config, tmp_path / "one", *changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", "train.py"]
    command += ["--config", str(config), "--output_dir", str(tmp_path / "two"), *changes]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for network in ("model", "adversary") if adversarial else ("model",):
        one = load_file(tmp_path / f"one/checkpoints/step_00000006/{network}.safetensors")
        two = load_file(tmp_path / f"two/checkpoints/step_00000006/{network}.safetensors")
        for name in one:
            # attention does not depend on the bias of its keys, so that gradient is rounding alone, which Adam makes full steps of
            assert name.endswith(".k.bias") or (one[name] - two[name]).abs().max() < 1e-4, name
    assert (tmp_path / "two/checkpoints/step_00000006/rng_1.pt").is_file()
