"""Official tokenizer weights to ours."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.vq import VQTokenizer


def llamagen_vq(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """LlamaGen VQ-16 / VQ-8 (FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py). Names are the same.

    `quantize.codebook_used` is a log of recent codes and is left behind.
    """
    module = VQTokenizer(
        image_size=config.get("image_size", 256),
        codebook_size=config.get("codebook_size", 16384),
        codebook_dim=config.get("codebook_embed_dim", 8),
        codebook_l2_norm=config.get("codebook_l2_norm", True),
        commitment_beta=config.get("commit_loss_beta", 0.25),
        entropy_weight=config.get("entropy_loss_ratio", 0.0),
        base_channels=config.get("ch", 128),
        encoder_multipliers=tuple(config.get("encoder_ch_mult", (1, 1, 2, 2, 4))),
        decoder_multipliers=tuple(config.get("decoder_ch_mult", (1, 1, 2, 2, 4))),
        num_res_blocks=config.get("num_res_blocks", 2),
        z_channels=config.get("z_channels", 256),
        norm_groups=config.get("norm_groups", 32),
        dropout=config.get("dropout_p", 0.0),
    )
    return module, {name: tensor for name, tensor in state_dict.items() if name != "quantize.codebook_used"}


def taming_vqgan(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """VQGAN (CompVis/taming-transformers, taming/models/vqgan.py VQModel) with attention at the lowest resolution only, as released.

    The networks are LlamaGen's under other names; its decoder counts levels from the shallowest. Losses (`loss.*`) are left behind.
    `legacy`, the default and the way of all released models, puts `beta` on the codebook term.
    """
    network, legacy, beta = config["ddconfig"], config.get("legacy", True), config.get("beta", 0.25)
    multipliers = tuple(network["ch_mult"])
    lowest = network["resolution"] // 2 ** (len(multipliers) - 1)
    if list(network["attn_resolutions"]) != [lowest]:
        raise UserError(
            f"attn_resolutions {list(network['attn_resolutions'])}: only attention at the lowest resolution, {lowest}, is supported"
        )
    module = VQTokenizer(
        image_size=network["resolution"],
        codebook_size=config["n_embed"],
        codebook_dim=config["embed_dim"],
        codebook_l2_norm=False,
        commitment_beta=1.0 if legacy else beta,
        codebook_weight=beta if legacy else 1.0,
        base_channels=network["ch"],
        encoder_multipliers=multipliers,
        num_res_blocks=network["num_res_blocks"],
        z_channels=network["z_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        dropout=network.get("dropout", 0.0),
    )
    return module, _renamed(state_dict, len(multipliers) - 1, ("block_1", "attn_1", "block_2"))


def maskgit_vqgan(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """MaskGIT's tokenizer as PyTorch ports keep it (bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py)."""
    multipliers = tuple(config.get("channel_mult", (1, 1, 2, 2, 4)))
    z_channels, num_blocks = config.get("z_channels", 256), config.get("num_res_blocks", 2)
    module = _maskgit_style(
        image_size=config.get("resolution", 256),
        codebook_size=config.get("num_embeddings", 1024),
        commitment_beta=config.get("commitment_cost", 0.25),
        base_channels=config.get("hidden_channels", 128),
        encoder_multipliers=multipliers,
        num_res_blocks=num_blocks,
        num_mid_blocks=num_blocks,
        codebook_dim=z_channels,
        norm_groups=config.get("num_groups", 32),
        dropout=config.get("dropout", 0.0),
    )
    return module, _renamed(state_dict, len(multipliers) - 1)


def mage_vqgan(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """MAGE's tokenizer (LTH14/mage, taming/models/vqgan.py): MaskGIT's networks in VQGAN's layout, `beta` on the codebook term."""
    network = config["ddconfig"]
    module = _maskgit_style(
        image_size=network["resolution"],
        codebook_size=config["n_embed"],
        commitment_beta=1.0,
        codebook_weight=config.get("beta", 0.25),
        base_channels=network["ch"],
        encoder_multipliers=tuple(network["ch_mult"]),
        num_res_blocks=network["num_res_blocks"],
        codebook_dim=network["z_channels"],
        norm_groups=config.get("norm_num_groups", 32),
        dropout=network.get("dropout", 0.0),
    )
    return module, _renamed(state_dict, len(network["ch_mult"]) - 1, ("block_1", "block_2"))


def _maskgit_style(*, codebook_dim: int, **options: Any) -> VQTokenizer:
    return VQTokenizer(
        codebook_dim=codebook_dim,
        z_channels=codebook_dim,
        codebook_l2_norm=False,
        style="maskgit",
        use_quant_conv=False,
        unit_range=True,
        **options,
    )


def _renamed(state_dict: Mapping[str, Tensor], deepest: int, middle: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors under our names; networks of the loss are left behind."""
    return {_llamagen_name(name, deepest, middle): tensor for name, tensor in state_dict.items() if not name.startswith("loss.")}


def _llamagen_name(name: str, deepest: int, middle: Sequence[str] = ()) -> str:
    """Name of a tensor in LlamaGen's checkpoints: levels in the order in which they run, the middle as a list.

    Args:
        deepest: number of the deepest level.
        middle: names of the middle's parts in order, where they have names.
    """
    if level := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample|upsample_conv)\.(.*)", name):
        side, number = level[1].split(".")[0], int(level[2])
        place = number if side == "encoder" else deepest - number
        part = {"block": "res", "upsample_conv": "upsample.conv"}.get(level[3], level[3])
        return f"{side}.conv_blocks.{place}.{part}.{level[4]}"
    if (part_of_middle := re.fullmatch(r"(encoder|decoder)\.mid\.(\w+)\.(.*)", name)) and part_of_middle[2] in middle:
        return f"{part_of_middle[1]}.mid.{middle.index(part_of_middle[2])}.{part_of_middle[3]}"
    return name
