"""Rows V1 and V1k: images from codes by VQ-16 and by Stable Diffusion's KL decoder, beside diffusers' own networks with the same weights.

VQ-16 is LlamaGen's; diffusers' VQModel of its widths is the same network under other names. Both rows are timed against diffusers as it
comes; the peer in channels last, which diffusers' guide advises for speed, stands beside. Weights are random.

Shapes: codes [B, h, w], latents [B, c, h, w], images [B, 3, H, W].
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from genvision.bench.checks import WrongAnswer, check_close
from genvision.bench.floors import Floors, Work, counted_flops
from genvision.bench.row import Result, Row, measured, wrong
from genvision.bench.timing import by_turns
from genvision.tokenizers.kl import KLTokenizer
from genvision.tokenizers.vq import VQTokenizer

OWN, PEER, PEER_LAST = "genvision", "diffusers", "diffusers, channels last"
LAST = torch.channels_last
Peers = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the images and the rounds."""

    rounds: int = 9
    image_size: int = 256
    kl_image_size: int = 256
    """Of row V1k."""
    batch_size: int = 1


LONG = Sizes()
QUICK = Sizes(rounds=2, image_size=96, kl_image_size=48)


def measure(rows: Sequence[Row], sizes: Sizes) -> Iterator[Result]:
    torch.manual_seed(0)
    for row in rows:
        kind, make, size = {"V1": ("VQ-16", vq_peers, sizes.image_size), "V1k": ("KL f8", kl_peers, sizes.kl_image_size)}[row.name]
        with torch.inference_mode():
            peers = make(sizes.batch_size, size)
            result = decoding_result(row, f"{kind} decoder, {sizes.batch_size} image(s) of {size} px", peers, sizes.rounds)
        yield result


def decoding_result(row: Row, what: str, peers: Peers, rounds: int) -> Result:
    """Checks the images of all peers, then times them."""
    try:
        check = check_close("images", peers[OWN](), peers[PEER]())
        check_close("the peer's images in channels last", peers[PEER_LAST](), peers[PEER]())
    except WrongAnswer as error:
        return wrong(row, what, str(error))
    work = Work(counted_flops(peers[PEER]))  # ours saves some of its products
    floors = Floors(work)
    seconds = by_turns(peers | floors.calls, rounds, floors=list(floors.calls))
    last = measured(row, what, seconds, own=OWN, peer=PEER_LAST).ratio
    assert last is not None
    note = f"against the peer in channels last: {last.median:.2f}x [{last.low:.2f}, {last.high:.2f}]"
    floor = floors.floor(seconds, work)
    return measured(row, what, seconds, own=OWN, peer=PEER, floor=floor, check=f"{check} of diffusers'", notes=(note,))


def vq_peers(batch_size: int, size: int, tokenizer: VQTokenizer | None = None) -> Peers:
    """Codes to images, the look-up of the codes' vectors included."""
    ours = (tokenizer or VQTokenizer(image_size=size)).eval()
    peer, last = diffusers_vq(ours), diffusers_vq(ours).to(memory_format=LAST)
    codes = torch.randint(ours.config.codebook_size, (batch_size, *ours.spec.code_shape(size)))

    def decode(model: VQModel, layout: torch.memory_format) -> Tensor:
        vectors = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, ours.config.codebook_dim))  # [B, D, h, w]
        images: Tensor = model.decode(vectors.contiguous(memory_format=layout), force_not_quantize=True).sample
        return images

    return {OWN: lambda: ours.decode(codes), PEER: lambda: decode(peer, torch.contiguous_format), PEER_LAST: lambda: decode(last, LAST)}


def diffusers_vq(ours: VQTokenizer) -> VQModel:
    """VQModel with the widths, the decoder and the codes of our VQGAN-style tokenizer; its encoder is another one."""
    config = ours.config
    levels = len(config.encoder_multipliers)
    peer = VQModel(
        block_out_channels=tuple(config.base_channels * multiplier for multiplier in config.encoder_multipliers),
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        num_vq_embeddings=config.codebook_size,
        vq_embed_dim=config.codebook_dim,
        norm_num_groups=config.norm_groups,
    )
    state = peer.state_dict()
    parts = ("decoder.", "post_quant_conv.")
    given = {_diffusers_name(name): tensor for name, tensor in ours.state_dict().items() if name.startswith(parts)}
    assert given.keys() == {name for name in state if name.startswith(parts)}, "the networks differ"
    codes = ours.quantize.look_up(torch.arange(config.codebook_size))  # of unit length
    state |= {name: tensor.reshape(state[name].shape) for name, tensor in given.items()} | {"quantize.embedding.weight": codes}
    peer.load_state_dict(state)
    return peer.eval()


NAMES = (
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.conv_blocks\.(\d+)\.res\.", r".up_blocks.\1.resnets."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.conv_blocks\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
"""Parts of the names of our decoder, and of diffusers'."""


def _diffusers_name(name: str) -> str:
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def kl_peers(batch_size: int, size: int, tokenizer: KLTokenizer | None = None) -> Peers:
    """Latents to images; ours and diffusers' share one network."""
    ours = (tokenizer or KLTokenizer(image_size=size)).eval()
    peer = AutoencoderKL.from_config(ours.autoencoder.config).eval()
    last = AutoencoderKL.from_config(ours.autoencoder.config).eval()
    for copied in (peer, last):
        copied.load_state_dict(ours.autoencoder.state_dict())
    last.to(memory_format=LAST)
    latents = torch.randn(batch_size, *ours.spec.code_shape(size))
    latents_last = latents.contiguous(memory_format=LAST)
    return {
        OWN: lambda: ours.decode(latents),
        PEER: lambda: peer.decode(latents).sample,
        PEER_LAST: lambda: last.decode(latents_last).sample,
    }
