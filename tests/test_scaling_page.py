"""docs/scaling.md: its commands can be given, its tables are what the code counts, and its SLURM script stops, goes on and gives up."""

import functools
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from genvision.cli import COMMANDS
from genvision.config import flat_values, load_train_config, model_class, recipe_path, run_command
from genvision.data.code_storage import code_dtype
from genvision.data.transforms import ViewConfig
from genvision.presets import PRESETS
from genvision.training.config import DataConfig, LoopConfig, OptimConfig
from genvision.training.throughput import peak_of, training_flops

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SCRIPT = next(block for block in BLOCKS if block.startswith("#!"))
COMMAND_LINES = [line for block in BLOCKS if block != SCRIPT for line in block.splitlines()]
RUN = re.search(r"`\$RUN` stands for `(.*?)`", PAGE.replace("\n", " "))[1]
NUM_IMAGES = 1_281_167


def table(head: str) -> list[list[str]]:
    """Cells of the rows of the table that begins so."""
    rows = PAGE.partition(f"\n{head}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def rounded(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits}g}")


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_can_be_given(line):
    words = shlex.split(line.replace("$RUN", RUN))
    words = [word for word in words if not re.fullmatch(r"[A-Z0-9_]+=\S+", word)]
    if words[0] == "accelerate":
        launched = launch_command_parser().parse_args(words[2:])
        assert (ROOT / launched.config_file).is_file()
        assert launched.training_script == ("genvision" if launched.module else "train.py")
        words = [*([] if launched.module else ["train"]), *launched.training_script_args]
    else:
        assert words.pop(0) == "genvision"
    name, *argv = words
    if name == "train":
        load_train_config(argv)
        return
    function = COMMANDS[name]

    @functools.wraps(function)
    def parsed(*positional: object, **options: object) -> None:
        pass

    run_command(name, parsed, argv)
    if name == "import":
        assert argv[0] in PRESETS


def test_a_training_reads_what_was_encoded_or_imported_before():
    made = set(re.findall(r"--out (\S+)", "\n".join(COMMAND_LINES)))
    for line in COMMAND_LINES:
        if "train.py" in line:
            config, _ = load_train_config(shlex.split(line.partition("train.py ")[2]))
            spec, _, place = config.data.spec.partition(":")
            assert place in made if spec == "encoded" else config.data.spec == "imagenet:data/imagenet"
            assert config.tokenizer in made


def test_sizes_of_encoded_sets_are_those_of_their_formats():
    latent = 4
    sizes = [
        10 * 256 * code_dtype(16384).itemsize,
        2 * 256 * code_dtype(1024).itemsize,
        256 * code_dtype(16384).itemsize,
        2 * 64 * code_dtype(4096).itemsize,
        2 * 2 * 4 * 32 * 32 * latent,
        2 * 2 * 4 * 32 * 32 * latent // 2,
        2 * 2 * 32 * 16 * 16 * latent,
        2 * 4 * 32 * 32 * latent,
        256 * 768 * 2,
    ]
    assert ViewConfig(crops="ten", flip=True).num_views == 10 and ViewConfig(flip=True).num_views == 2
    rows = table("| set | views |")
    for row, size in zip(rows, sizes, strict=True):
        views, per_view = number(row[1]), number(row[2].rpartition("=")[2])
        assert views * per_view == size, row
        wanted = number(row[3].removesuffix(" GB"))
        assert wanted == pytest.approx(size * NUM_IMAGES / 1e9, rel=0.02), row


def test_sizes_of_checkpoints_follow_from_parameters():
    for name, million, one, four in table("| model | million parameters |"):
        size = number(million) * 1e6 * (4 + 8 + 4) / 1e9
        assert number(one.removesuffix(" GB")) == rounded(size), name
        assert number(four.removesuffix(" GB")) == rounded(4 * size, 3 if size > 25 else 2), name


ESTIMATES = {path: row for row in table("| recipe | GFLOP") for path in re.findall(r"`(\S+)`", row[0])}


@pytest.mark.parametrize("recipe", ESTIMATES)
def test_estimates_follow_from_flops_and_peaks(recipe):
    row, config = ESTIMATES[recipe], load_train_config(["--config", recipe])[0]
    num_images = config.train.num_steps * config.train.batch_size
    assert float(row[2]) == rounded(num_images)
    assert row[3] == ("tf32" if config.train.precision == "no" else config.train.precision)
    flops = forward_and_backward(config)
    stated = [number(part) for part in row[1].split(" + ")]
    assert stated[0] == pytest.approx(flops / 1e9, rel=0.005)
    for gpu, cell in (("A100", row[4]), ("H100", row[5])):
        rate, days = re.fullmatch(r"([\d,]+)/s, ([\d.]+) days", cell).groups()
        exact = 8 * peak_of(gpu, row[3]) * 0.40 / (flops + 1e9 * sum(stated[1:]))
        assert number(rate) == rounded(exact)
        assert float(days) == pytest.approx(num_images / exact / 86400, rel=0.06)


def forward_and_backward(config) -> float:
    """FLOPs of an image, counted without computing anything."""
    name, options = config.model["name"], {key: value for key, value in config.model.items() if key not in ("name", "num_classes")}
    labels = torch.zeros(1, dtype=torch.long, device="meta")
    with torch.device("meta"):
        if name == "dit":
            channels, side = (4, 32) if config.model["patch_size"] == 2 else (32, 16)
            model = model_class(name)(num_classes=1000, in_channels=channels, input_size=side, **options)
            x = torch.zeros(1, channels, side, side)
            return training_flops(lambda: model(x, torch.zeros(1), labels, **({"with_features": True} if options["align_depth"] else {})))
        codebook_size = 16384 if "vq16" in config.tokenizer else 1024
        model = model_class(name)(num_classes=1000, grid_size=16, codebook_size=codebook_size, **options)
        codes = torch.zeros(1, 256, dtype=torch.long)
        if name == "llamagen":
            return training_flops(lambda: model(codes[:, :-1], labels))
        if name == "mage":  # half of the tokens are not read
            return training_flops(lambda: model(codes, labels, kept=codes[:, :128]))
        return training_flops(lambda: model(codes, labels))


def test_what_the_page_names_exists():
    for file in re.findall(r"`(genvision/[\w/]+\.py)`", PAGE):
        assert (ROOT / file).is_file()
    listed = {row[0].strip("`") for row in table("| file | what it starts |")}
    assert listed == {path.name for path in (ROOT / "configs" / "accelerate").iterdir()}
    for recipe in re.findall(r"`(\w+/\w+_imagenet256\.yaml)`", PAGE):
        assert recipe_path(recipe).is_file()
    config, _ = load_train_config(["--config", "dit/sit_xl2_imagenet256.yaml"])
    known = set(flat_values(config))
    for key in re.findall(r"`(?:--)?((?:data|optim|train|lora|scores)\.\w+)", PAGE):
        assert key in known, key
    assert LoopConfig(num_steps=1).stall_seconds == 1800 and LoopConfig(num_steps=1).max_skipped_steps == 100
    assert LoopConfig(num_steps=1).keep_checkpoints == 3
    assert DataConfig(spec="x").on_bad_image == "stop" and OptimConfig().train_only == ()


STAND_INS = {
    "srun": 'shift; export SLURM_NODEID=0; exec "$@"',
    "scontrol": 'echo "$@" >> calls; if [ "$1" = show ]; then echo node0; fi',
    "scancel": 'echo "scancel $@" >> calls; kill -USR1 "$(cat training.pid)"',
    # a training that writes a checkpoint when it is told to stop, and ends as the launcher then does
    "accelerate": 'echo "$@" >> starts; echo $$ > training.pid; trap "sleep 0.2; echo written > checkpoint; exit 1" USR1\n'
    'case "$(cat plan)" in done) exit 0;; failing) exit 1;; once) echo done > plan; exit 75;; esac\nwhile :; do sleep 0.02; done',
}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder with the script, and commands that stand in for SLURM's and for the training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(SCRIPT)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "PAUSE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(("plan", "status", "starts"), [("done", 0, 1), ("once", 0, 2), ("failing", 1, 5)])
def test_the_slurm_script_starts_a_failed_training_again_some_times(cluster, plan, status, starts):
    (cluster / "plan").write_text(plan)
    assert subprocess.run(["bash", "job.sh"], timeout=30).returncode == status
    lines = (cluster / "starts").read_text().splitlines()
    assert len(lines) == starts
    assert lines[0].startswith(
        "launch --config_file configs/accelerate/two_nodes_fsdp2.yaml --machine_rank 0 --main_process_ip node0 train.py"
    )
    assert "requeue" not in (cluster / "calls").read_text()


@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGTERM])
def test_the_slurm_script_waits_for_the_checkpoint_and_queues_again(cluster, how):
    (cluster / "plan").write_text("training")
    process = subprocess.Popen(["bash", "job.sh"])
    deadline = time.monotonic() + 20
    while not (cluster / "training.pid").exists() or not (cluster / "training.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)  # for its trap
    process.send_signal(how)
    assert process.wait(timeout=20) == 0
    assert (cluster / "checkpoint").read_text() == "written\n"
    assert (cluster / "calls").read_text().splitlines()[-2:] == ["scancel --signal=USR1 7", "requeue 7"]
    assert len((cluster / "starts").read_text().splitlines()) == 1
