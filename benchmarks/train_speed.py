"""What the training loop costs: its steps beside those of the same model in a bare Accelerate loop, by turns in one process.

Both train the same model with the same objective on the same batches of an encoded data set (written for this run): forward and
backward pass, clipping, AdamW. Ours besides agrees, logs, watches for stalls and, with --ema, averages the weights; the bare loop then has
diffusers' EMAModel. The time of a step is that between two requests for a batch, data included; checkpoints and starts lie outside. How
long our loop waits for data is told from its own log.

    python benchmarks/train_speed.py --model dit --rounds 5             # DiT-S/2 on latents of 4 x 32 x 32, batches of 4
    python benchmarks/train_speed.py --model llamagen --rounds 5        # 384 x 12, 256 tokens of 16,384 codes
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timing import NUM_THREADS, machine_load, median_interval

# isort: split
import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from genvision.data.array_files import write_json
from genvision.data.datasets import batches
from genvision.data.encoded import EncodedDataset
from genvision.objectives.flow import FlowLossConfig, FlowMatching
from genvision.objectives.next_token import NextToken
from genvision.training.config import DataConfig, LoopConfig, OptimConfig, TrainConfig
from genvision.training.generator_stage import GeneratorStage
from genvision.training.loop import train

NUM_SAMPLES, CODES = 2048, 16384
LEFT_OUT = 2
"""Steps at the start of every block that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["dit", "llamagen"], default="dit")
    parser.add_argument("--hidden-dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of a block that are counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ema", action="store_true", help="average the weights in both loops")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as folder:
        data = write_set(Path(folder) / "codes", arguments.model)
        ratios, waits, ours_all, bare_all = [], [], [], []
        for number in range(arguments.rounds + 1):
            pair = {}
            for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
                output = Path(folder) / f"{name}{number}"
                loop = our_loop if name == "ours" else bare_loop
                pair[name] = timed(loop, arguments, data, output)
            if number == 0:
                continue
            ratios += [ours / bare for ours, bare in zip(pair["ours"], pair["bare"], strict=True)]
            ours_all += pair["ours"]
            bare_all += pair["bare"]
            lines = (Path(folder) / f"ours{number}" / "metrics.jsonl").read_text().splitlines()
            waits.append(json.loads(lines[-1])["data_wait"])
    low, high, _ = median_interval(ratios)
    what = f"{arguments.model} {arguments.hidden_dim} x {arguments.depth}, batch {arguments.batch_size}, ema {arguments.ema}"
    print(f"{what}, {NUM_THREADS} thread(s), {len(ratios)} pairs of steps; {machine_load()}")
    print(f"CPU seconds a step: ours {statistics.median(ours_all):.3f}, bare Accelerate {statistics.median(bare_all):.3f}")
    print(f"ratio {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]; least times {min(ours_all) / min(bare_all):.4f}")
    print(f"data wait {100 * statistics.median(waits):.2f} %")


def timed(loop: Callable[..., None], arguments: Any, data: Path, output: Path) -> list[float]:
    """CPU seconds of the counted steps of a block."""
    output.mkdir()
    marks: list[float] = []
    loop(arguments, data, output, marks)
    return np.diff(marks)[LEFT_OUT:].tolist()


def our_loop(arguments: Any, data: Path, output: Path, marks: list[float]) -> None:
    model, objective = build(arguments)
    num_steps = LEFT_OUT + arguments.steps + 1
    config = TrainConfig(
        stage="generator",
        output_dir=str(output),
        model={},
        data=DataConfig(spec="encoded"),
        optim=OptimConfig(),
        train=LoopConfig(
            num_steps=num_steps,
            batch_size=arguments.batch_size,
            ema_decays=(0.9999,) if arguments.ema else (),
            log_every=num_steps - 1,
            preview_every=0,
        ),
    )
    dataset = EncodedDataset(data)

    def stream(start_step: int, rank: int, world_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches(dataset, seed=0, start_step=start_step, batch_size=arguments.batch_size):
            marks.append(time.process_time())
            yield batch

    stage = GeneratorStage(model, objective, torch.nn.Identity())
    train(config, Accelerator(cpu=True), stage, stream)


def bare_loop(arguments: Any, data: Path, output: Path, marks: list[float]) -> None:
    model, objective = build(arguments)
    accelerator = Accelerator(cpu=True)
    options = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    ema = EMAModel(model.parameters(), decay=0.9999) if arguments.ema else None
    stream = iter(batches(EncodedDataset(data), seed=0, batch_size=arguments.batch_size))
    for _ in range(LEFT_OUT + arguments.steps + 1):
        batch = next(stream)
        marks.append(time.process_time())
        with accelerator.accumulate(model):
            loss = objective(model, batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if ema is not None:
            ema.step(model.parameters())


def build(arguments: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_dim": arguments.hidden_dim, "depth": arguments.depth, "num_heads": 6}
    if arguments.model == "dit":
        from genvision.models.dit import DiT

        dit = DiT(input_size=32, in_channels=4, patch_size=2, path="linear", prediction="velocity", **sizes)
        return dit, FlowMatching(FlowLossConfig(), dit, seed=0, batch_size=arguments.batch_size)
    from genvision.models.llamagen import LlamaGen

    return LlamaGen(codebook_size=CODES, grid_size=16, **sizes), NextToken(CODES)


def write_set(folder: Path, model: str) -> Path:
    """An encoded data set of random latents or codes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    is_latent = model == "dit"
    shape = (4, 32, 32) if is_latent else (16, 16)
    codes = (
        rng.standard_normal((NUM_SAMPLES, 1, *shape), dtype=np.float32) if is_latent else rng.integers(0, CODES, (NUM_SAMPLES, 1, *shape))
    )
    np.save(folder / "codes-00000.npy", codes if is_latent else codes.astype(np.uint16))
    np.save(folder / "labels-00000.npy", rng.integers(0, 1000, NUM_SAMPLES))
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
        "shards": [{"count": NUM_SAMPLES, "codes": "codes-00000.npy", "labels": "labels-00000.npy"}],
    }
    write_json(folder / "index.json", index)
    return folder


if __name__ == "__main__":
    main()
