"""How much of what the machine can do does masked decoding do: its matrix products a second beside those of one large product.

A job draws 256 tokens of each image with MaskGIT's transformer (B: 12 layers of width 768; 12 steps, by confidence), guidance off and
random weights; everything counts that the sampler does: embeddings, blocks, attention, head, the draws and the choice of tokens. The work
is that which the program counts (`MaskedSampler.multiply_adds`, tested against torch's counter). The peak is that of one product of two
2048 x 2048 matrices, taken before and after every job in the same process; the fraction is taken within a round.

    python benchmarks/masked_speed.py                                   # one thread, 4 images, 9 rounds; about 6 minutes
    python benchmarks/masked_speed.py --depth 4 --images 2 --rounds 3   # half a minute
    python benchmarks/masked_speed.py --nesting 8x3,4x3,2x3,1x3 --cache # smaller networks first, and keys and values kept
"""

import argparse
import statistics
import time

from timing import NUM_THREADS, machine_load, median_interval

# isort: split
import torch

from genvision.models.maskgit import MaskGIT
from genvision.samplers.masked import MaskedSampler
from genvision.samplers.randomness import ImageStreams

SIDE = 2048


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
    torch.manual_seed(0)
    sizes = {"hidden_dim": arguments.hidden_dim, "depth": arguments.depth, "num_heads": arguments.num_heads}
    model = MaskGIT(codebook_size=1024, grid_size=16, **sizes).eval()
    sampler = MaskedSampler(
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        nesting=arguments.nesting,
        use_cache=arguments.cache,
        order=arguments.order,
    )
    labels, noise = torch.arange(arguments.images), ImageStreams(0, range(arguments.images))
    work = 2e-9 * arguments.images * sampler.multiply_adds(model)
    print(f"{work / arguments.images:.1f} GFLOP an image in {sampler.network_calls(model)} network calls; {machine_load()}")
    left, right = torch.randn(2, SIDE, SIDE).unbind()
    fractions, speeds, peaks = [], [], []
    for number in range(arguments.rounds + 1):
        before = gemm_speed(left, right)
        began = time.process_time()
        sampler.sample(model, labels, noise)
        speed = work / (time.process_time() - began)
        peak = max(before, gemm_speed(left, right))
        if number > 0:
            fractions.append(speed / peak)
            speeds.append(speed)
            peaks.append(peak)
            print(f"{speed:6.1f} GFLOP/s of {peak:6.1f}: {fractions[-1]:.3f}", flush=True)
    low, high, coverage = median_interval(fractions)
    print(
        f"fraction of the GEMM peak {statistics.median(fractions):.3f} [{low:.3f}, {high:.3f}] ({coverage:.0%}), {NUM_THREADS} thread(s), "
        f"{len(fractions)} rounds; medians {statistics.median(speeds):.1f} and {statistics.median(peaks):.1f} GFLOP/s; {machine_load()}"
    )


def gemm_speed(left: torch.Tensor, right: torch.Tensor) -> float:
    """GFLOP/s of the fastest of three products, by CPU time."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        left @ right
        seconds.append(time.process_time() - began)
    return 2e-9 * SIDE**3 / min(seconds)


if __name__ == "__main__":
    main()
