"""Official tokenizer weights to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
