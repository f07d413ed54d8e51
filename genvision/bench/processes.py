"""Rows I1 and I2: whole processes, from start to end.

I1 is `python -m genvision sample`, which reads a tiny LlamaGen, draws an image and writes it, beside a script that only imports diffusers'
DiT and AutoencoderKL. Processes run by turns after a first of each, which fills the page cache, and is not counted; their time is user and
system time of the process and its children, and wall time stands beside. I2 is the import of the package, timed inside a fresh process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from genvision.bench.checks import WrongAnswer
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import Seconds

OWN, PEER, TORCH = "genvision", "diffusers", "torch"
IMPORT_PEER = "from diffusers import DiTTransformer2DModel, AutoencoderKL"
TIMED_IMPORT = "import time; began = time.perf_counter(); import genvision; print(time.perf_counter() - began)"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rounds of both rows."""

    rounds: int = 9
    import_rounds: int = 25
    warm: bool = True
    """Run each process once before the first round."""


LONG = Sizes()
QUICK = Sizes(rounds=1, import_rounds=9)


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    for row in rows:
        yield _sampling(row, sizes) if row.name == "I1" else _importing(row, sizes)


def _sampling(row: Row, sizes: Sizes) -> Result:
    what = "the command genvision sample, one image of a tiny LlamaGen"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = write_tiny_pipeline(folder / "model")
        command = [sys.executable, "-m", "genvision", "sample", "--model", str(folder / "model"), "--num", "1", "--out"]
        commands = {
            OWN: [*command, str(folder / "image.png")],
            PEER: [sys.executable, "-c", IMPORT_PEER],
            TORCH: [sys.executable, "-c", "import torch"],
        }
        try:
            check = check_sampled(commands[OWN], folder / "image.png", side)
            seconds = processes_by_turns(commands, sizes.rounds, warm=sizes.warm, written=folder / "image.png")
        except WrongAnswer as error:
            return wrong(row, what, str(error))
    floor = ("import torch alone", min(seconds.cpu[TORCH]))
    return measured(row, what, seconds, own=OWN, peer=PEER, floor=floor, check=check, unit="process")


def _importing(row: Row, sizes: Sizes) -> Result:
    loaded = output_of([sys.executable, "-c", "import sys, genvision; print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules))"])
    if loaded.split():
        return wrong(row, "import genvision", f"it takes along {', '.join(loaded.split())}")
    wall = [float(output_of([sys.executable, "-c", TIMED_IMPORT])) for _ in range(sizes.import_rounds)]
    seconds = Seconds({OWN: wall}, {OWN: wall})
    check = "neither torch, numpy nor diffusers imported"
    return measured(row, "import genvision", seconds, own=OWN, check=check, clock="wall", unit="import")


def write_tiny_pipeline(folder: Path) -> int:
    """A pipeline with a LlamaGen of 16 tokens, random weights; returns the side of its images."""
    import torch

    from genvision.models.llamagen import LlamaGen
    from genvision.pipeline import ImagePipeline
    from genvision.samplers.autoregressive import AutoregressiveSampler
    from genvision.tokenizers.vq import VQTokenizer

    torch.manual_seed(0)
    widths = {"base_channels": 8, "encoder_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 2}
    tokenizer = VQTokenizer(image_size=8, codebook_size=32, codebook_dim=4, **widths)
    generator = LlamaGen(codebook_size=32, grid_size=4, hidden_dim=32, depth=2, num_heads=2, num_classes=2, mlp_multiple_of=8)
    ImagePipeline(generator, tokenizer, AutoregressiveSampler(guidance_scale=2.0), ["one", "other"]).save_pretrained(folder)
    return 8


def check_sampled(command: Sequence[str], image: Path, side: int) -> str:
    """Runs the command, which must write an image that is not of one colour.

    Raises:
        WrongAnswer: it fails, or the image is another one.
    """
    run_process(command)
    with Image.open(image) as picture:
        size, colours = picture.size, picture.convert("RGB").getextrema()
    if min(size) < side or all(low == high for low, high in colours):
        raise WrongAnswer(f"an image of {size[0]} x {size[1]} pixels, range {colours}, was written")
    return f"an image of {size[0]} x {size[1]} px is written"


def processes_by_turns(commands: Mapping[str, Sequence[str]], rounds: int, *, warm: bool, written: Path) -> Seconds:
    """Times of fresh processes, the order turned on by one each round.

    Args:
        warm: one more round, the first, is not counted.
        written: what a process writes, removed before each.

    Raises:
        WrongAnswer: a process fails.
    """
    names = list(commands)
    seconds = Seconds({name: [] for name in names}, {name: [] for name in names})
    for number in range(rounds + warm):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            written.unlink(missing_ok=True)
            cpu, wall = run_process(commands[name])
            if number >= warm:
                seconds.cpu[name].append(cpu)
                seconds.wall[name].append(wall)
    return seconds


def run_process(command: Sequence[str]) -> tuple[float, float]:
    """User and system seconds of the process and of those that it waited for, and wall seconds.

    Raises:
        WrongAnswer: it fails.
    """
    with tempfile.TemporaryFile("w+") as told:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            told.seek(0)
            last = (told.read().splitlines() or ["it said nothing"])[-1]
            raise WrongAnswer(f"{' '.join(command[1:4])} ends with status {process.returncode}: {last}")
    return usage.ru_utime + usage.ru_stime, wall


def output_of(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
