"""How fast are images made of codes: our tokenizers beside those of diffusers, with the same widths and the same work?

All peers run in this process, by turns, in float32 under inference_mode; the order turns round every round. What counts is the median
over the rounds of (time of diffusers) / (time of a peer), each taken within one round. CPU time is that of all threads and the fairer
measure where other programs run beside; its least value over the rounds, which they disturbed least, and wall time are printed, too.
Weights are random: the arithmetic does not depend on them. Peers have the same ones, and their images are compared before anything is
timed: a difference above 1e-4 of the largest number ends the run.

vq: codes [B, h, w] -> images by LlamaGen's VQ-16 and by diffusers' VQModel of its widths.
kl: latents -> images by KLTokenizer with Stable Diffusion's widths and by the AutoencoderKL inside it.

`channels last` is the peer whose weights and input were given that layout beforehand, which diffusers' guide advises for speed.
`genvision benchmark V1,V1k` measures the same at a fixed size (genvision.bench.decoders).

    taskset -c 1 python benchmarks/tokenizer_speed.py                    # both, batches of 1 and 4, one thread: about 15 minutes
    python benchmarks/tokenizer_speed.py --models vq --batch-sizes 1 --threads 2
"""

import argparse
import statistics

from genvision.bench.timing import NUM_THREADS, Seconds, by_turns, ratios

# isort: split
import torch

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.decoders import OWN, PEER, PEER_LAST, Peers, kl_peers, vq_peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vq,kl", help="vq, kl or both")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-sizes", default="1,4", help="images at once, several by commas")
    parser.add_argument("--rounds", type=int, default=5, help="times that each peer decodes each batch, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    for model in arguments.models.split(","):
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            with torch.inference_mode():
                peers = {"vq": vq_peers, "kl": kl_peers}[model](batch_size, arguments.size)
                compare(model, peers)
                seconds = by_turns(peers, arguments.rounds)
            report(f"{model}, {batch_size} x {arguments.size} px, {NUM_THREADS} threads, {arguments.rounds} rounds", seconds)


def compare(model: str, peers: Peers) -> None:
    try:
        print(check_close(f"{model}: images", peers[OWN](), peers[PEER]()), "of diffusers', relative to the largest number")
    except WrongAnswer as error:
        raise SystemExit(f"{error}; nothing was timed") from error


def report(title: str, seconds: Seconds) -> None:
    cpu, wall = seconds.cpu, seconds.wall
    print(
        f"\n{title}\n{'':26} {'CPU s':>8} {'least':>8} {'wall s':>8}   times as fast as diffusers by: {'CPU':>7} {'least':>7} {'wall':>7}"
    )
    for name in cpu:
        times = [statistics.median(cpu[name]), min(cpu[name]), statistics.median(wall[name])]
        factors = [ratio(cpu, PEER, name), min(cpu[PEER]) / min(cpu[name]), ratio(wall, PEER, name)]
        print(f"{name:26} {''.join(f'{value:8.3f} ' for value in times)} {'':30} {''.join(f'{value:7.3f} ' for value in factors)}")
    least = min(cpu[PEER_LAST]) / min(cpu[OWN])
    print(
        f"genvision is {ratio(cpu, PEER_LAST, OWN):.3f} (least: {least:.3f}) times as fast as diffusers in channels last\n",
        flush=True,
    )


def ratio(seconds: dict[str, list[float]], peer: str, own: str) -> float:
    """Median over the rounds."""
    return statistics.median(ratios(seconds, peer, own))


if __name__ == "__main__":
    main()
