"""What befalls long runs, really done to them: signals, dead workers, a full disk, damaged files, a dead process, a stall."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from shard_examples import write_shards
from small_disk import small_disk
from started_processes import SHARDED, finish, free_port, kill, run, start
from training_examples import Runs, assert_equal_weights, assert_same_run, newest_step

from genvision.cli import main
from genvision.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs/accelerate"
STEPS = 60
LOOP = {"num_steps": STEPS, "batch_size": 8, "ema_decays": [0.9], "log_every": 5, "checkpoint_every": 5, "preview_every": 0}
FLOW = {
    "stage": "generator",
    "seed": 5,
    "tokenizer": "pixels:gray",
    "data": {"spec": "digits", "image_size": 8, "num_workers": 0},
    "model": {"name": "dit", "hidden_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "path": "linear", "prediction": "velocity"},
    "optim": {"lr": 0.01},
    "train": LOOP,
}


@pytest.fixture
def train(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run."""
    return Runs(tmp_path_factory.mktemp("whole"))("whole", FLOW)


@pytest.fixture
def photos(tmp_path) -> Path:
    """40 images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return tmp_path / "photos"


def on_photos(photos: Path, workers: int) -> dict:
    # a random crop is decoded anew at every visit
    return FLOW | {"tokenizer": "pixels", "data": {"spec": f"folder:{photos}", "image_size": 8, "crop": "random", "num_workers": workers}}


def wait_for(condition, alive) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_of_two_processes_ends_both_behind_a_checkpoint(train, number):
    config = FLOW | {"train": LOOP | {"num_steps": 400, "checkpoint_every": 150}}
    words = train.words("run", config)
    processes = start(words)
    wait_for(lambda: newest_step(train.folder / "run") >= 150, lambda: all(process.is_alive() for process in processes))
    os.kill(processes[1].pid, number)
    assert finish(processes) == [0, 0]
    assert 150 < newest_step(train.folder / "run") < 400 and newest_step(train.folder / "run") % 150


def test_a_decoding_process_that_dies_is_replaced(train, photos, tmp_path):
    undisturbed = train("undisturbed", on_photos(photos, 0))
    words = train.words("disturbed", on_photos(photos, 2))
    (process,) = start(words, num=1, errors=tmp_path / "stderr")

    def decoding() -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

    wait_for(lambda: newest_step(train.folder / "disturbed") >= 5 and decoding(), process.is_alive)
    os.kill(decoding()[0], signal.SIGKILL)
    assert finish([process]) == [0]
    assert "died" in (tmp_path / "stderr.0").read_text()
    assert_same_run(undisturbed, train.folder / "disturbed")


def test_a_full_disk_costs_the_checkpoints_that_do_not_fit(train, whole, tmp_path, capfd):
    size = sum(path.stat().st_size for path in (whole / f"checkpoints/step_{STEPS:08d}").iterdir())
    with small_disk(6 * size, tmp_path / "disk") as disk:
        words = [*train.words("run", FLOW), "--output_dir", str(disk / "run"), "--train.keep_checkpoints", "2"]
        main([*words, "--train.num_steps", "20"])
        before = {step: (disk / f"run/checkpoints/step_{step:08d}/model.safetensors").read_bytes() for step in (15, 20)}
        free = shutil.disk_usage(disk).free
        (disk / "others.bin").write_bytes(b"\0" * (free - size // 2))
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--train.num_steps", "30"])
        assert stopped.value.code == 2
        message = capfd.readouterr().err.splitlines()[-1]
        assert "step_00000030: the checkpoint cannot be written" in message and "No space left" in message
        assert "the checkpoint of step 20 is kept; make room, then run the same command again" in message
        assert {path.name for path in (disk / "run/checkpoints").iterdir()} == {"step_00000015", "step_00000020"}
        assert all((disk / f"run/checkpoints/step_{step:08d}/model.safetensors").read_bytes() == data for step, data in before.items())
        (disk / "others.bin").unlink()
        main(words)
        assert_same_run(whole, disk / "run")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no state"])
def test_a_damaged_newest_checkpoint_is_set_aside(train, whole, damage, capsys, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    newest = output / f"checkpoints/step_{STEPS:08d}"
    file = newest / ("state.json" if damage == "no state" else "model.safetensors")
    data = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    main(train.words("run", FLOW))
    assert f"{file}: the checkpoint is damaged" in (said := capsys.readouterr().err)
    assert "going on from step 55" in said
    assert (output / "checkpoints" / f"{newest.name}.damaged").is_dir()
    assert_same_run(whole, output)


def test_without_a_whole_checkpoint_nothing_begins_anew(train, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    for folder in (output / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints can be read; restore one, or delete"):
        main(["--debug", *train.words("run", FLOW)])
    with pytest.raises(UserError, match="none of its checkpoints can be read"):  # nor the second time
        main(["--debug", *train.words("run", FLOW)])


def test_a_shard_that_is_damaged_in_mid_run_is_named_and_what_was_trained_is_kept(train, tiny_tokenizer, tiny_codes, tmp_path, capsys):
    codes = shutil.copytree(tiny_codes, tmp_path / "codes")
    model = {"name": "llamagen", "hidden_dim": 16, "depth": 1, "num_heads": 2, "mlp_multiple_of": 8}
    config = {"stage": "generator", "tokenizer": str(tiny_tokenizer), "data": {"spec": f"encoded:{codes}"}, "model": model, "train": LOOP}
    undisturbed = train("undisturbed", config)
    (shard,) = codes.glob("codes-*.npy")
    data = shard.read_bytes()
    late = len(data) // 2
    shard.write_bytes(data[:late] + b"\xff" * (len(data) - late))
    with pytest.raises(SystemExit) as stopped:
        main(train.words("run", config))
    assert stopped.value.code == 2
    assert f"{shard}: holds 255, but its codebook has codes 0 .. 15" in capsys.readouterr().err
    shard.write_bytes(data)
    reached = newest_step(train.folder / "run")
    main(train.words("run", config))
    assert reached < STEPS  # the state in which it stopped
    assert_same_run(undisturbed, train.folder / "run")


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["whole", "split"])
def test_the_process_that_is_left_alone_says_so_in_one_line(train, tmp_path, environment):
    words = train.words("run", FLOW | {"train": LOOP | {"num_steps": 4000}})
    processes = start(words, environment=environment, errors=tmp_path / "stderr")
    wait_for(lambda: newest_step(train.folder / "run") >= 10, lambda: all(process.is_alive() for process in processes))
    processes[1].kill()
    processes[0].join(60)
    assert processes[0].exitcode == 2
    line = (tmp_path / "stderr.0").read_text().splitlines()[-1]
    assert "rank 0, step " in line and "lost contact with another process" in line and "goes on from the checkpoint of step" in line


def test_a_step_that_stands_still_ends_with_rank_and_phase(train, photos, tmp_path):
    config = on_photos(photos, 0) | {"train": LOOP | {"num_steps": 4000, "stall_seconds": 1.0}}
    processes = start(train.words("run", config), errors=tmp_path / "stderr")
    try:
        wait_for(lambda: newest_step(train.folder / "run") >= 10, lambda: all(process.is_alive() for process in processes))
        for path in sorted(photos.rglob("*.png"))[:20]:  # a file of a network disk that hangs: opening it never ends
            path.unlink()
            os.mkfifo(path)
        deadline = time.monotonic() + 60
        while all(process.is_alive() for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill(processes)
    assert 75 in [process.exitcode for process in processes]
    said = "".join((tmp_path / f"stderr.{rank}").read_text() for rank in range(2))
    assert re.search(r"rank [01] of 2 processes: step \d+ stalled in phase data", said)
    assert newest_step(train.folder / "run") >= 10


def test_a_second_run_in_the_same_folder_is_refused(train):
    config = FLOW | {"train": LOOP | {"num_steps": 4000}}
    words = train.words("run", config)
    (process,) = start(words, num=1)
    wait_for(lambda: newest_step(train.folder / "run") >= 5, process.is_alive)
    with pytest.raises(UserError, match=rf"another run is in this folder \(process {process.pid} on .*\); stop it, or choose"):
        main(["--debug", *words])
    assert process.is_alive()
    kill([process])
    main([*words, "--train.num_steps", str(max(STEPS, newest_step(train.folder / "run") + 1))])  # its lock died with it


def test_one_shard_is_enough_for_two_processes(train, tmp_path):
    data = {"spec": f"wds:{write_shards(tmp_path / 'shards', 24, 1)}", "image_size": 8, "num_workers": 1}
    config = FLOW | {"tokenizer": "pixels", "data": data, "train": LOOP | {"num_steps": 10}}
    one = train("one", config)
    run(train.words("two", config))
    assert_equal_weights(one, train.folder / "two")


def test_a_batch_smaller_than_the_processes_is_refused(train, tmp_path):
    processes = start(train.words("run", FLOW | {"train": LOOP | {"batch_size": 1}}), errors=tmp_path / "stderr")
    assert 2 in finish(processes)
    assert "train.batch_size 1 does not divide into 2 processes" in (tmp_path / "stderr.0").read_text()


def test_other_data_or_another_tokenizer_is_refused_unless_it_is_allowed(train, photos, capsys):
    config = on_photos(photos, 0) | {"train": LOOP | {"num_steps": 5}}
    train("run", config)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(photos / "a" / "more.png")
    longer = train.words("run", config, "--train.num_steps", 10)
    with pytest.raises(UserError, match=r"was trained with another data \(.*accept the change by --allow-change data"):
        main(["--debug", *longer])
    main([*longer, "--allow-change", "data"])
    assert newest_step(train.folder / "run") == 10


def test_an_option_that_changes_the_result_is_refused_unless_it_is_allowed(train, photos):
    config = FLOW | {"train": LOOP | {"num_steps": 5}}
    train("run", config)
    longer = train.words("run", config, "--train.num_steps", 10, "--optim.lr", 0.001)
    with pytest.raises(UserError, match=r"started with optim\.lr 0\.01, now it is 0\.001; .* --allow-change optim\.lr"):
        main(["--debug", *longer])
    photographs = ["--data.spec", f"folder:{photos}", "--tokenizer", "pixels"]
    with pytest.raises(UserError, match="was trained with another data"):
        main(["--debug", *longer, *photographs, "--allow-change", "optim.lr"])
    assert yaml.safe_load((train.folder / "run/config.yaml").read_text())["optim"]["lr"] == 0.01  # what was refused is not written down
    main([*longer, "--allow-change", "optim.lr"])
    events = (train.folder / "run/events.jsonl").read_text()
    assert '"changed"' in events and '"optim.lr": [0.01, 0.001]' in events


def test_the_launcher_ends_a_job_whose_process_is_killed(train, tmp_path):
    """As `accelerate launch` does; the same command then goes on."""
    words = train.words("run", FLOW | {"train": LOOP | {"num_steps": 4000}})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "eight_gpus.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port()), "-m", "genvision", *words]
    process = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: newest_step(train.folder / "run") >= 10, lambda: process.poll() is None)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[1], signal.SIGKILL)
    process.communicate(timeout=60)
    reached = newest_step(train.folder / "run")
    assert process.returncode != 0 and reached >= 10
    main([*words, "--train.num_steps", str(reached + 5)])
    assert newest_step(train.folder / "run") == reached + 5
