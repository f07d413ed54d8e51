"""How fast is a diffusion transformer: ours beside that of diffusers, with the same weights, the same noise and the same numbers out?

forward: one call of DiT and of DiTTransformer2DModel, every row with its own time and class. `modulation known` is given what
    depends on time and class, as samplers do.
loop: images by guided DDIM, decoder included, by DiffusionSampler and by DiTPipeline as its users call it; and by DiffusionSampler with
    guidance in the second half of the steps only, which DiTPipeline cannot do. Every run is a job of its own: our tables are built
    again. Both decode with one tiny AutoencoderKL, which takes next to no time.

Before anything is timed, outputs are compared: a difference above 1e-4 of the largest number ends the run. The guided half is compared
with a loop over diffusers' network and scheduler. Peers then run in this process by turns, in float32, and what counts is the median of
ratios taken within a round, of CPU time. `genvision benchmark D1,D2,D3` measures the same at fixed sizes (genvision.bench.diffusion).

    python benchmarks/dit_speed.py                                           # S/2, one thread: forward 8 rows, loop 4 images; 30 minutes
    python benchmarks/dit_speed.py --parts forward --size b --batch-size 4 --rounds 15
    python benchmarks/dit_speed.py --parts loop --size tiny --steps 10       # a minute
"""

import argparse

from genvision.bench.timing import NUM_THREADS, by_turns, print_comparison

# isort: split
import torch
from torch import Tensor

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.diffusion import GUIDANCE, HALF, KNOWN, NETWORKS, OWN, PEER, Loops, diffusers_twin, forward_peers, random_dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="forward,loop", help="forward, loop or both")
    parser.add_argument("--size", default="s", choices=NETWORKS, help="of the network; patches of 2 x 2")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of the forward pass")
    parser.add_argument("--rounds", type=int, default=15, help="times that each peer is timed on the forward pass, after one to warm up")
    parser.add_argument("--images", type=int, default=4, help="of the loop; guided steps have twice as many rows")
    parser.add_argument("--steps", type=int, default=50, help="of the loop")
    parser.add_argument("--loop-rounds", type=int, default=5, help="the same for the loop")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE, help="4 is DiTPipeline's default")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    ours = random_dit(**NETWORKS[arguments.size])
    peer = diffusers_twin(ours)
    name = f"DiT-{arguments.size.upper()}/2"
    with torch.inference_mode():
        if "forward" in arguments.parts.split(","):
            peers = forward_peers(ours, peer, arguments.batch_size)
            for own in (OWN, KNOWN):
                compare(f"forward, {own}", peers[own](), peers[PEER]())
            print_comparison(f"forward of {name}, {arguments.batch_size} rows", by_turns(peers, arguments.rounds), PEER)
        if "loop" in arguments.parts.split(","):
            loops = Loops(ours, peer, arguments.images, arguments.steps, arguments.guidance_scale)
            peers = loops.peers()
            for own in (OWN, HALF):
                compare(f"loop, {own}", peers[own](), loops.expected(own))
            title = f"DDIM of {name}, {arguments.steps} steps, guidance {arguments.guidance_scale:g}, {arguments.images} images"
            print_comparison(title, by_turns(peers, arguments.loop_rounds), PEER)


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    try:
        print(check_close(what, found, expected), "of the largest number", flush=True)
    except WrongAnswer as error:
        raise SystemExit(f"{error}; nothing was timed") from error


if __name__ == "__main__":
    main()
