"""Official generator weights to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.models.llamagen import LlamaGen

LLAMAGEN_NAMES = {
    r"^cls_embedding\.embedding_table\.": "condition_embed.table.",
    r"^cls_embedding\.uncond_embedding$": "condition_embed.null_features",
    r"^cls_embedding\.cap_proj\.": "condition_embed.",
    r"^tok_embeddings\.": "token_embed.",
    r"^layers\.(\d+)\.attention\.wqkv\.": r"blocks.\1.attention.qkv.",
    r"^layers\.(\d+)\.attention\.wo\.": r"blocks.\1.attention.proj.",
    r"^layers\.(\d+)\.feed_forward\.w1\.": r"blocks.\1.mlp.gate.",
    r"^layers\.(\d+)\.feed_forward\.w3\.": r"blocks.\1.mlp.up.",
    r"^layers\.(\d+)\.feed_forward\.w2\.": r"blocks.\1.mlp.down.",
    r"^layers\.(\d+)\.attention_norm\.": r"blocks.\1.norm1.",
    r"^layers\.(\d+)\.ffn_norm\.": r"blocks.\1.norm2.",
    r"^output\.": "head.",
}


def llamagen_gpt(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """LlamaGen GPT, class- or text-conditional (FoundationVision/LlamaGen, autoregressive/models/gpt.py).

    A stored rotary table (`freqs_cis`) is computed anew, so that one extra key is left behind.
    """
    text = config.get("model_type", "c2i") == "t2i"
    module = LlamaGen(
        codebook_size=config.get("vocab_size", 16384),
        grid_size=round(config.get("block_size", 256) ** 0.5),
        hidden_dim=config.get("dim", 4096),
        depth=config.get("n_layer", 32),
        num_heads=config.get("n_head", 32),
        num_kv_heads=config.get("n_kv_head"),
        num_classes=config.get("num_classes", 1000),
        class_dropout=config.get("class_dropout_prob", 0.1),
        condition="text" if text else "class",
        text_length=config.get("cls_token_num", 120) if text else 120,
        text_dim=config.get("caption_dim", 2048),
        mlp_multiple_of=config.get("multiple_of", 256),
        mlp_multiplier=config.get("ffn_dim_multiplier"),
        rope_base=config.get("rope_base", 10000),
        norm_eps=config.get("norm_eps", 1e-5),
        token_dropout=config.get("token_dropout_p", 0.1),
        attention_dropout=config.get("attn_dropout_p", 0.0),
        residual_dropout=config.get("resid_dropout_p", 0.1),
        mlp_dropout=config.get("ffn_dropout_p", 0.1),
        drop_path=config.get("drop_path_rate", 0.0),
        init_std=config.get("initializer_range", 0.02),
    )
    return module, renamed(state_dict, LLAMAGEN_NAMES, ignore={"freqs_cis"})


def renamed(state_dict: Mapping[str, Tensor], names: Mapping[str, str], ignore: set[str]) -> dict[str, Tensor]:
    """Apply the first pattern that matches each key; keys that none matches keep their name."""
    result = {}
    for key, tensor in state_dict.items():
        if key in ignore:
            continue
        new = next((re.sub(pattern, name, key) for pattern, name in names.items() if re.search(pattern, key)), key)
        result[new] = tensor
    return result
