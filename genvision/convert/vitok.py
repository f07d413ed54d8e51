"""Official ViTok weights to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.errors import UserError
from genvision.tokenizers.vit import ViTok


def vitok(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """ViTok (philippe-eecs/vitok, pytorch_vitok_old/models/ae.py AE). Names are the same.

    `block_casual` builds a mask there that nothing uses; `checkpoint` saves memory only. Both are left out.
    """
    if config.get("channels", 3) != 3:
        raise UserError(f"channels {config['channels']}: only images of 3 channels are supported")
    if config.get("norm_layer", "layer") != "layer":
        raise UserError(f"norm_layer '{config['norm_layer']}': only 'layer' is supported")
    simple, theta, width, heads = (
        config.get("simple", True),
        config.get("rope_theta", 10000.0),
        config.get("width", 768),
        config.get("num_heads", 12),
    )
    lengths = config.get("lengths")
    module = ViTok(
        image_size=config.get("img_size", 256),
        num_frames=config.get("num_frames", 1),
        patch_size=config.get("patch_size", 16),
        tubelet_size=config.get("tubelet_size", 1),
        encoder_width=width,
        encoder_depth=config.get("encoder_depth", 6),
        encoder_heads=heads,
        decoder_width=width,
        decoder_depth=config.get("decoder_depth", 12),
        decoder_heads=heads,
        code_length=None if simple else config.get("code_length", 256),
        code_width=config.get("code_width", 16),
        variational=config.get("variational", True),
        rope_style=config.get("rope_style", "1d_axial") if theta else "none",
        rope_theta=theta or 10000.0,
        position_embedding=config.get("posemb", "nope"),
        code_lengths=None if lengths is None else tuple(lengths),
    )
    return module, dict(state_dict)
