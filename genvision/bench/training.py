"""Rows T1 and T1g: steps of the training loop, beside the same model and objective in a bare Accelerate loop.

Both train on the same batches of an encoded data set (written for this run): forward and backward pass, clipping, AdamW. Ours besides
agrees, logs, watches for stalls and, where asked, averages the weights; the bare loop then has diffusers' EMAModel. The time of a step is
that between two requests for a batch, data included; checkpoints and starts lie outside. Blocks of steps of both loops run by turns.
Before anything is timed, both loops must come to the same losses.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.floors import PRODUCT, Floors, Work, counted_flops
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import Seconds, by_turns
from genvision.data.array_files import write_json
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset
from genvision.objectives.flow import FlowLossConfig, FlowMatching
from genvision.objectives.next_token import NextToken
from genvision.training import rng
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, TrainConfig
from genvision.training.generator_stage import GeneratorStage
from genvision.training.loop import train

OWN, PEER = "genvision", "bare Accelerate"
CODES = 16384
LEFT_OUT = 2
"""Steps at the start of every block that are not counted."""
Mark = tuple[float, float]
"""CPU and wall seconds when a batch was asked for."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained, and how often."""

    rounds: int = 9
    """Blocks of either loop."""
    steps: int = 4
    """Of a block that are counted."""
    model: str = "dit"
    """`dit` on latents of 4 x side x side, patches of 2 x 2; or `llamagen` on side/2 x side/2 tokens of 16,384 codes."""
    side: int = 32
    hidden_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    batch_size: int = 4
    ema: bool = False
    """Average the weights in both loops."""
    num_samples: int = 256
    """Of the data set."""


LONG = Sizes()
QUICK = Sizes(rounds=1, steps=2, batch_size=1, depth=2, num_samples=32)
Loop = Callable[[Sizes, Path, Path, list[Mark]], list[float]]


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    for row in rows:
        yield _steps(row, replace(sizes, model="llamagen" if row.name == "T1g" else "dit"))


def _steps(row: Row, sizes: Sizes) -> Result:
    name = {"dit": "DiT/2", "llamagen": "LlamaGen"}[sizes.model]
    what = f"training step of {name} {sizes.hidden_dim} x {sizes.depth}, batch {sizes.batch_size}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_set(folder / "codes", sizes)
        try:
            check = check_losses(sizes, data, folder)
        except WrongAnswer as error:
            return wrong(row, what, str(error))
        work = Work(step_flops(sizes, data))
        floors = Floors(work)
        blocks, waits = Blocks(sizes, data, folder), []
        machine = by_turns(floors.calls, 1, floors=list(floors.calls))
        for number in range(sizes.rounds + 1):
            blocks.turn(number)
            if number:
                machine.cpu[PRODUCT] += by_turns(floors.calls, 1, floors=list(floors.calls)).cpu[PRODUCT]
                waits.append(blocks.data_wait())
    notes = (f"waits {100 * statistics.median(waits):.1f} % of its time for data",)
    floor = floors.floor(machine, work)
    return measured(row, what, blocks.seconds, own=OWN, peer=PEER, floor=floor, check=check, unit="step", notes=notes)


class Blocks:
    """Blocks of steps of both loops, by turns; `seconds` has the steps one by one."""

    def __init__(self, sizes: Sizes, data: Path, folder: Path) -> None:
        self.sizes, self.data, self.folder = sizes, data, folder
        self.seconds = Seconds({OWN: [], PEER: []}, {OWN: [], PEER: []})
        self.latest = folder

    def turn(self, number: int) -> None:
        """A block of each loop, number 0 to warm up."""
        loops: dict[str, Loop] = {OWN: our_loop, PEER: bare_loop}
        for name in list(loops)[:: 1 if number % 2 else -1]:
            output = self.folder / f"{name} {number}"
            output.mkdir()
            if name == OWN:
                self.latest = output
            marks: list[Mark] = []
            loops[name](self.sizes, self.data, output, marks)
            spent = np.diff(np.array(marks), axis=0)[LEFT_OUT:]
            if number:
                # a block is a round: its steps are not independent
                self.seconds.cpu[name].append(float(np.median(spent[:, 0])))
                self.seconds.wall[name].append(float(np.median(spent[:, 1])))

    def data_wait(self) -> float:
        """Part of the time of our last block that it waited for batches, from its own log."""
        lines = (self.latest / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(lines[-1])["data_wait"])


def check_losses(sizes: Sizes, data: Path, folder: Path) -> str:
    """Three steps of either loop must have the same losses.

    Raises:
        WrongAnswer: they have not.
    """
    short, losses = replace(sizes, steps=0), {}
    for name, loop in ((OWN, our_loop), (PEER, bare_loop)):
        output = folder / f"check {name}"
        output.mkdir()
        losses[name] = torch.tensor(loop(short, data, output, []))
    return check_close(f"losses of {len(losses[OWN])} steps", losses[OWN], losses[PEER])


def our_loop(sizes: Sizes, data: Path, output: Path, marks: list[Mark]) -> list[float]:
    """Train; `marks` receives when batches were asked for. Returns the losses that it logged."""
    model, objective = build(sizes)
    num_steps = LEFT_OUT + sizes.steps + 1
    config = TrainConfig(
        stage="generator",
        output_dir=str(output),
        model={},
        data=DataConfig(spec="encoded"),
        optim=OptimConfig(),
        train=LoopConfig(
            num_steps=num_steps,
            batch_size=sizes.batch_size,
            ema_decays=(0.9999,) if sizes.ema else (),
            log_every=num_steps - 1 if sizes.steps else 1,
            preview_every=0,
        ),
    )
    dataset = EncodedDataset(data)

    def stream(start_step: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        for batch in batches(dataset, seed=0, start_step=start_step, batch_size=sizes.batch_size):
            marks.append((time.process_time(), time.perf_counter()))
            yield batch

    with redirect_stderr(StringIO()):  # its progress
        train(config, Accelerator(cpu=True), GeneratorStage(model, objective, torch.nn.Identity()), stream)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def bare_loop(sizes: Sizes, data: Path, output: Path, marks: list[Mark]) -> list[float]:
    """The same by hand; returns the loss of every step."""
    model, objective = build(sizes)
    accelerator = Accelerator(cpu=True)
    options = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    ema = None
    if sizes.ema:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(model.parameters(), decay=0.9999)
    rng.start(0, 0, 0)  # the dropout of our loop
    stream, losses = iter(batches(EncodedDataset(data), seed=0, batch_size=sizes.batch_size)), []
    for _ in range(LEFT_OUT + sizes.steps + 1):
        batch = next(stream)
        marks.append((time.process_time(), time.perf_counter()))
        with accelerator.accumulate(model):
            loss = objective(model, batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if ema is not None:
            ema.step(model.parameters())
        losses.append(float(loss.detach()))
    return losses


def step_flops(sizes: Sizes, data: Path) -> float:
    """Of the forward and backward pass of one batch."""
    model, objective = build(sizes)
    batch = next(iter(batches(EncodedDataset(data), seed=0, batch_size=sizes.batch_size)))
    return counted_flops(lambda: objective(model, batch)["loss"].backward())


def build(sizes: Sizes) -> tuple[Any, Any]:
    """Model and objective."""
    torch.manual_seed(0)
    shape = {"hidden_dim": sizes.hidden_dim, "depth": sizes.depth, "num_heads": sizes.num_heads}
    if sizes.model == "dit":
        from genvision.models.dit import DiT

        dit = DiT(input_size=sizes.side, in_channels=4, patch_size=2, path="linear", prediction="velocity", **shape)
        return dit, FlowMatching(FlowLossConfig(), dit, seed=0, batch_size=sizes.batch_size)
    from genvision.models.llamagen import LlamaGen

    return LlamaGen(codebook_size=CODES, grid_size=sizes.side // 2, **shape), NextToken(CODES)


def write_set(folder: Path, sizes: Sizes) -> Path:
    """An encoded data set of random latents or codes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    is_latent = sizes.model == "dit"
    shape = (4, sizes.side, sizes.side) if is_latent else (sizes.side // 2, sizes.side // 2)
    places = (sizes.num_samples, 1, *shape)
    if is_latent:
        codes = generator.standard_normal(places, dtype=np.float32)
    else:
        codes = generator.integers(0, CODES, places).astype(np.uint16)
    np.save(folder / "codes-00000.npy", codes)
    np.save(folder / "labels-00000.npy", generator.integers(0, 1000, sizes.num_samples))
    index = {
        "format_version": 1,
        "kind": "latents" if is_latent else "codes",
        "dtype": "float32",
        "code_shape": list(shape),
        "codebook_size": None if is_latent else CODES,
        "views": 1,
        "image_size": 256,
        "tokenizer_hash": "random",
        "label_names": [str(i) for i in range(1000)],
        "shards": [{"count": sizes.num_samples, "codes": "codes-00000.npy", "labels": "labels-00000.npy"}],
    }
    write_json(folder / "index.json", index)
    return folder
