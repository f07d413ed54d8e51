"""Weights of KL autoencoders to ours: diffusers' layout, and CompVis' of latent and stable diffusion."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.kl import KLTokenizer, from_diffusers_config

PREFIX = "first_stage_model."
"""Before the autoencoder's names in a checkpoint of a whole diffusion model."""
ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""CompVis' names, then those of early diffusers, to the present ones."""


def autoencoder_kl(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """AutoencoderKL of diffusers (models/autoencoders/autoencoder_kl.py) or CompVis (latent-diffusion, ldm/models/autoencoder.py).

    Tensors may have the names of either, whatever the kind of `config`. The rest of a diffusion checkpoint and losses (`loss.*`) are
    left behind.

    Args:
        config: of diffusers; or CompVis' `ddconfig`, alone or under that name. Beside the latter may stand `embed_dim`, `norm_num_groups`,
            `use_quant_conv` (False for FLUX and SD3) and, from the diffusion model's options, `scale_factor` and `shift_factor`.
    """
    compvis = "ddconfig" in config or "ch_mult" in config
    module = KLTokenizer(**(from_compvis_config(config) if compvis else from_diffusers_config(config)))
    if any(name.startswith(PREFIX) for name in state_dict):
        state_dict = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)}
    num_levels = len(module.config.block_out_channels)
    renamed = {}
    for name, tensor in state_dict.items():
        if not name.startswith("loss."):
            new = diffusers_name(name, num_levels)
            is_linear = ".attentions." in new and tensor.dim() == 4  # a 1x1 convolution there
            renamed[f"autoencoder.{new}"] = tensor.flatten(1) if is_linear else tensor
    return module, renamed


def from_compvis_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of KLTokenizer for CompVis' options; what is left out has their default.

    Raises:
        UserError: an option is set in a way that the network here does not know.
    """
    network = config.get("ddconfig", config)
    scale, shift, quant_conv = config.get("scale_factor", 1.0), config.get("shift_factor", 0.0), config.get("use_quant_conv", True)
    z_channels = network["z_channels"]
    fixed = {"in_channels": 3, "out_ch": 3, "double_z": True, "dropout": 0.0}
    for name, value in fixed.items():
        if network.get(name, value) != value:
            raise UserError(f"ddconfig.{name} is {network[name]}; only {value} is supported")
    if config.get("embed_dim", z_channels) != z_channels:
        raise UserError(f"embed_dim {config['embed_dim']} differs from ddconfig.z_channels {z_channels}; diffusers' network has one width")
    multipliers = network["ch_mult"]
    if multipliers[0] != 1:
        raise UserError(f"ddconfig.ch_mult {list(multipliers)}: diffusers' network starts with the width of the first level, 1 is expected")
    sides = [network["resolution"] // 2**level for level in range(len(multipliers))]
    return {
        "image_size": network["resolution"],
        "block_out_channels": tuple(network["ch"] * multiplier for multiplier in multipliers),
        "layers_per_block": network["num_res_blocks"],
        "latent_channels": z_channels,
        "norm_num_groups": config.get("norm_num_groups", 32),
        "attention_levels": tuple(level for level, side in enumerate(sides) if side in network.get("attn_resolutions", [])),
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
        "latent_mean": shift,
        "latent_std": 1 / scale,
    }


def diffusers_name(name: str, num_levels: int) -> str:
    """diffusers' present name of a tensor that CompVis or an early diffusers named; other names stay.

    CompVis counts the decoder's levels from the shallowest, diffusers in the order in which they run.
    """
    if level := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.*)", name):
        side, number, kind, rest = level.groups()
        place = int(number) if side == "encoder.down" else num_levels - 1 - int(number)
        parts = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
        name = f"{side}_blocks.{place}.{parts[kind]}.{rest}"
    elif middle := re.fullmatch(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.*)", name):
        parts = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
        name = f"{middle[1]}.mid_block.{parts[middle[2]]}.{middle[3]}"
    elif last := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.*)", name):
        name = f"{last[1]}.conv_norm_out.{last[2]}"
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    if attention := re.fullmatch(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)", name):
        name = f"{attention[1]}.{ATTENTION.get(attention[2], attention[2])}.{attention[3]}"
    return name
