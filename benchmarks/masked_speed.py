"""How much of what the machine can do does masked decoding do: its matrix products a second beside those of one large product.

A job draws 256 tokens of each image with MaskGIT's transformer (B: 12 layers of width 768; 12 steps, by confidence), guidance off and
random weights; everything counts that the sampler does: embeddings, blocks, attention, head, the draws and the choice of tokens. The work
is that which the program counts (`MaskedSampler.multiply_adds`, tested against torch's counter). The peak is that of one product of two
2048 x 2048 matrices, the best of the run, taken by turns with the jobs in the same process.
`genvision benchmark M1` measures the same at a fixed size (genvision.bench.masked).

    python benchmarks/masked_speed.py                                   # one thread, 4 images, 9 rounds; about 6 minutes
    python benchmarks/masked_speed.py --depth 4 --images 2 --rounds 3   # half a minute
    python benchmarks/masked_speed.py --nesting 8x3,4x3,2x3,1x3 --cache # smaller networks first, and keys and values kept
"""

import argparse
import statistics

from genvision.bench.timing import NUM_THREADS, by_turns, machine_load, median_interval

# isort: split
import torch

from genvision.bench.floors import Floors
from genvision.bench.masked import OWN, DecodingJob, Sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--images", type=int, default=4, help="of a batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--nesting", default="1")
    parser.add_argument("--cache", action="store_true", help="keep keys and values of known tokens")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--order", default="confidence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    options = {"num_steps": arguments.steps, "guidance_scale": arguments.guidance, "nesting": arguments.nesting}
    options |= {"use_cache": arguments.cache, "order": arguments.order}
    network = {"hidden_dim": arguments.hidden_dim, "depth": arguments.depth, "num_heads": arguments.num_heads}
    job = DecodingJob(Sizes(images=arguments.images, options=options, **network))
    work = 1e-9 * job.work.flops
    calls = job.sampler.network_calls(job.model)
    print(f"{work / arguments.images:.1f} GFLOP an image in {calls} network calls; {machine_load()}")
    floors = Floors(job.work)
    seconds = by_turns({OWN: job.draw} | floors.calls, arguments.rounds, floors=list(floors.calls))
    peak = work / floors.floor(seconds, job.work)[1]
    speeds = [work / spent for spent in seconds.cpu[OWN]]
    fractions = [speed / peak for speed in speeds]
    low, high, coverage = median_interval(fractions)
    print(
        f"fraction of the GEMM peak {statistics.median(fractions):.3f} [{low:.3f}, {high:.3f}] ({coverage:.0%}), {NUM_THREADS} thread(s), "
        f"{len(fractions)} rounds; median {statistics.median(speeds):.1f} of {peak:.1f} GFLOP/s; {machine_load()}"
    )


if __name__ == "__main__":
    main()
