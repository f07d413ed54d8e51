"""Official RAR weights to ours (bytedance/1d-tokenizer, modeling/rar.py).

One table holds codes, an unused mask token, classes and the null class there; position tables have rows that no image of the model's
size reads.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.convert.generators import renamed
from genvision.models.rar import RAR

NAMES = {
    r"^blocks\.(\d+)\.attn\.": r"blocks.\1.attention.",
    r"^blocks\.(\d+)\.adaLN_modulation\.1\.": r"blocks.\1.modulation.",
    r"^adaln_before_head\.adaLN_modulation\.1\.": "head.modulation.",
    r"^lm_head\.": "head.linear.",
}
SPARE_POSITIONS = 1024 - 2
"""Rows behind those of start, class and image."""
SPARE_PLACES = 100 - 2


def rar(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """RAR.

    Args:
        config: keys of `model.generator` of the original configuration, and `codebook_size`.
    """
    codebook_size, length = config.get("codebook_size", 1024), config.get("image_seq_len", 256)
    side = math.isqrt(length)
    module = RAR(
        codebook_size=codebook_size,
        grid_size=max(side, 1),
        hidden_dim=config.get("hidden_size", 768),
        depth=config.get("num_hidden_layers", 24),
        num_heads=config.get("num_attention_heads", 16),
        mlp_dim=config.get("intermediate_size", 3072),
        num_classes=config.get("condition_num_classes", 1000),
        class_dropout=config.get("class_label_dropout", 0.1),
        attention_dropout=config.get("attn_drop", 0.1),
        residual_dropout=config.get("dropout", 0.1),
        mlp_dropout=config.get("dropout", 0.1),
        sequence_length=None if side * side == length else length,
    )
    ours = renamed(state_dict, NAMES, ignore=set())
    if "embeddings.weight" in ours:
        table = ours.pop("embeddings.weight")
        ours["token_embed.weight"], ours["label_embed.table.weight"] = table[:codebook_size], table[codebook_size + 1 :]
    # cut from the end, so that tables for another number of tokens are of a wrong shape, and named as such
    tables = {
        "cls_token": ("start_token", lambda x: x[0, 0]),
        "pos_embed": ("position_table", lambda x: x[0, :-SPARE_POSITIONS]),
        "target_aware_pos_embed": ("next_position_table", lambda x: x[0, 2:-SPARE_POSITIONS]),
        "timesteps_embeddings": ("place_table", lambda x: x[0, :-SPARE_PLACES]),
    }
    for name, (here, part) in tables.items():
        if name in ours:
            ours[here] = part(ours.pop(name)).clone()
    return module, ours
