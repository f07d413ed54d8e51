"""What the training loop costs: its steps beside those of the same model in a bare Accelerate loop, by turns in one process.

Both train the same model with the same objective on the same batches of an encoded data set (written for this run): forward and
backward pass, clipping, AdamW. Ours besides agrees, logs, watches for stalls and, with --ema, averages the weights; the bare loop then has
diffusers' EMAModel. The time of a step is that between two requests for a batch, data included; checkpoints and starts lie outside. How
long our loop waits for data is told from its own log. The losses of the first steps must be equal, or nothing is timed.
`genvision benchmark T1,T1g` measures the same at fixed sizes (genvision.bench.training).

    python benchmarks/train_speed.py --model dit --rounds 5             # DiT-S/2 on latents of 4 x 32 x 32, batches of 4
    python benchmarks/train_speed.py --model llamagen --rounds 5        # 384 x 12, 256 tokens of 16,384 codes
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from genvision.bench.timing import NUM_THREADS, machine_load, median_interval, ratios

# isort: split
import torch

from genvision.bench.checks import WrongAnswer
from genvision.bench.training import OWN, PEER, Blocks, Sizes, check_losses, write_set


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
    options = {name: value for name, value in vars(arguments).items() if name != "threads"}
    sizes = Sizes(num_samples=2048, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_set(folder / "codes", sizes)
        try:
            print(check_losses(sizes, data, folder), flush=True)
        except WrongAnswer as error:
            raise SystemExit(f"{error}; nothing was timed") from error
        blocks, waits = Blocks(sizes, data, folder), []
        for number in range(sizes.rounds + 1):
            blocks.turn(number)
            if number:
                waits.append(blocks.data_wait())
    cpu = blocks.seconds.cpu
    times = [1 / ratio for ratio in ratios(cpu, PEER, OWN)]
    low, high, _ = median_interval(times)
    what = f"{sizes.model} {sizes.hidden_dim} x {sizes.depth}, batch {sizes.batch_size}, ema {sizes.ema}"
    print(f"{what}, {NUM_THREADS} thread(s), {len(times)} pairs of steps; {machine_load()}")
    print(f"CPU seconds a step: ours {statistics.median(cpu[OWN]):.3f}, bare Accelerate {statistics.median(cpu[PEER]):.3f}")
    print(f"ratio {statistics.median(times):.4f} [{low:.4f}, {high:.4f}]; least times {min(cpu[OWN]) / min(cpu[PEER]):.4f}")
    print(f"data wait {100 * statistics.median(waits):.2f} %")


if __name__ == "__main__":
    main()
