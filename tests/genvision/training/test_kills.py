"""Runs of two processes, killed again and again at random moments, both or one alone: no bit of what they end with changes."""

import json
import random
import time
from pathlib import Path

import pytest
from started_processes import GATHERED, SHARDED, finish, kill, run, start
from training_examples import Runs, newest_step

from genvision.training.state import CheckpointFolder

STEPS = 240
CONFIG = {
    "stage": "generator",
    "seed": 4,
    "model": {"name": "llamagen", "hidden_dim": 32, "depth": 3, "num_heads": 2, "mlp_multiple_of": 8},  # with dropout
    "optim": {"lr": 0.01, "warmup_steps": 20, "schedule": "cosine"},
    "train": {
        "num_steps": STEPS,
        "batch_size": 16,
        "accumulation": 2,
        "ema_decays": [0.99, 0.9],
        "log_every": 20,
        "checkpoint_every": 3,
        "preview_every": 80,
    },
}
KINDS = {"whole": {}, "split": SHARDED, "gathered": GATHERED}


@pytest.fixture(scope="module")
def config(tiny_tokenizer, tiny_codes) -> dict:
    return CONFIG | {"tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{tiny_codes}"}}


def check_every_checkpoint(output: Path) -> None:
    checkpoints = CheckpointFolder(output / "checkpoints", 3)
    for step in checkpoints.steps():
        assert checkpoints.read(step)["data_position"] == step * 16


def killed(words: list[str], output: Path, environment: dict[str, str], kills: int, seed: int) -> None:
    """Run to the end, with so many kills on the way."""
    moments = random.Random(seed)
    for number in range(1, kills + 1):
        processes = start(words, environment=environment)
        target = max(newest_step(output) + 1, STEPS * number // (kills + 1))
        deadline = time.monotonic() + 120
        while newest_step(output) < target:
            assert all(process.is_alive() for process in processes), [process.exitcode for process in processes]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        if moments.random() < 0.5:
            kill(processes)
        else:  # the other one notices
            processes[moments.randrange(2)].kill()
            assert any(finish(processes))
        check_every_checkpoint(output)
    assert newest_step(output) < STEPS
    run(words, environment=environment)


def assert_same_files(one: Path, other: Path) -> None:
    last = f"checkpoints/step_{STEPS:08d}"
    names = sorted(path.name for path in (one / last).iterdir())
    assert names == sorted(path.name for path in (other / last).iterdir())
    for name in names:
        if name == "state.json":
            facts = [json.loads((run / last / name).read_text()) for run in (one, other)]
            assert facts[0] == facts[1]
            continue
        assert (one / last / name).read_bytes() == (other / last / name).read_bytes(), name
    for path in (one / "model").rglob("*.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("whole", 2), ("split", 2), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_random_kills_change_no_bit(tmp_path, config, kind, kills):
    train, environment = Runs(tmp_path), KINDS[kind]
    run(train.words("undisturbed", config), environment=environment)
    killed(train.words("killed", config), tmp_path / "killed", environment, kills, seed=kills)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "killed")
    lines = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(20, STEPS + 1, 20))
