"""How fast are images made of codes: our tokenizers beside those of diffusers, with the same widths and the same work?

All peers run in this process, by turns, in float32 under inference_mode; the order turns round every round. What counts is the median
over the rounds of (time of diffusers) / (time of a peer), each taken within one round. CPU time is that of all threads and the fairer
measure where other programs run beside; its least value over the rounds, which they disturbed least, and wall time are printed, too.
Weights are random: the arithmetic does not depend on them.

vq: codes [B, h, w] -> images by LlamaGen's VQ-16 and by diffusers' VQModel of its widths, which has as many parameters.
kl: latents -> images by KLTokenizer with Stable Diffusion's widths and by the AutoencoderKL inside it.

`channels last` is the peer whose weights and input were given that layout beforehand, which diffusers' guide advises for speed.

    taskset -c 1 python benchmarks/tokenizer_speed.py                    # both, batches of 1 and 4, one thread: about 15 minutes
    python benchmarks/tokenizer_speed.py --models vq --batch-sizes 1 --threads 2
"""

import argparse
import statistics
from collections.abc import Callable

from timing import NUM_THREADS, Seconds, by_turns, ratios

# isort: split
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.vq import VQTokenizer

PEER, PEER_LAST = "diffusers", "diffusers, channels last"
LAST = torch.channels_last


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
                seconds = by_turns(peers, arguments.rounds)
            report(f"{model}, {batch_size} x {arguments.size} px, {NUM_THREADS} threads, {arguments.rounds} rounds", seconds)


def vq_peers(batch_size: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """Codes to images, the look-up of the codes' vectors included."""
    ours = VQTokenizer(image_size=size).eval()
    num_levels = len(ours.config.encoder_multipliers)
    peer, last = (
        VQModel(
            block_out_channels=tuple(ours.config.base_channels * multiplier for multiplier in ours.config.encoder_multipliers),
            down_block_types=("DownEncoderBlock2D",) * (num_levels - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (num_levels - 1),
            layers_per_block=ours.config.num_res_blocks,
            latent_channels=ours.config.z_channels,
            num_vq_embeddings=ours.config.codebook_size,
            vq_embed_dim=ours.config.codebook_dim,
            norm_num_groups=ours.config.norm_groups,
        ).eval()
        for _ in range(2)
    )
    print(f"parameters of the decoders: {num_parameters(ours.decoder):,} ours, {num_parameters(peer.decoder):,} of diffusers' VQModel")
    last.to(memory_format=LAST)
    codes = torch.randint(ours.config.codebook_size, (batch_size, *ours.spec.code_shape(size)))

    def decode(model: VQModel, layout: torch.memory_format) -> Tensor:
        vectors = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, ours.config.codebook_dim))  # [B, D, h, w]
        images: Tensor = model.decode(vectors.contiguous(memory_format=layout), force_not_quantize=True).sample
        return images

    return {
        "genvision": lambda: ours.decode(codes),
        PEER: lambda: decode(peer, torch.contiguous_format),
        PEER_LAST: lambda: decode(last, LAST),
    }


def kl_peers(batch_size: int, size: int) -> dict[str, Callable[[], Tensor]]:
    """Latents to images; ours and diffusers' share one network."""
    ours = KLTokenizer(image_size=size).eval()
    peer = ours.autoencoder
    last = AutoencoderKL.from_config(peer.config).eval().to(memory_format=LAST)
    latents = torch.randn(batch_size, *ours.spec.code_shape(size))
    latents_last = latents.contiguous(memory_format=LAST)
    print(f"parameters of the decoders: {num_parameters(peer.decoder):,}")
    torch.testing.assert_close(ours.decode(latents), peer.decode(latents).sample, atol=1e-3, rtol=0)
    return {
        "genvision": lambda: ours.decode(latents),
        PEER: lambda: peer.decode(latents).sample,
        PEER_LAST: lambda: last.decode(latents_last).sample,
    }


def report(title: str, seconds: Seconds) -> None:
    cpu, wall = seconds.cpu, seconds.wall
    print(
        f"\n{title}\n{'':26} {'CPU s':>8} {'least':>8} {'wall s':>8}   times as fast as diffusers by: {'CPU':>7} {'least':>7} {'wall':>7}"
    )
    for name in cpu:
        times = [statistics.median(cpu[name]), min(cpu[name]), statistics.median(wall[name])]
        factors = [ratio(cpu, PEER, name), min(cpu[PEER]) / min(cpu[name]), ratio(wall, PEER, name)]
        print(f"{name:26} {''.join(f'{value:8.3f} ' for value in times)} {'':30} {''.join(f'{value:7.3f} ' for value in factors)}")
    least = min(cpu[PEER_LAST]) / min(cpu["genvision"])
    print(
        f"genvision is {ratio(cpu, PEER_LAST, 'genvision'):.3f} (least: {least:.3f}) times as fast as diffusers in channels last\n",
        flush=True,
    )


def ratio(seconds: dict[str, list[float]], peer: str, own: str) -> float:
    """Median over the rounds."""
    return statistics.median(ratios(seconds, peer, own))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
