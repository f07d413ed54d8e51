"""Official MAGE weights (LTH14/mage, models_mage.py) to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genvision.convert.generators import renamed
from genvision.errors import UserError
from genvision.models.mage import MAGE

NAMES = {
    r"^token_emb\.word_embeddings\.": "words.",
    r"^token_emb\.position_embeddings\.weight$": "positions",
    r"^token_emb\.LayerNorm\.": "embed_norm.",
    r"^(decoder_)?blocks\.(\d+)\.attn\.": r"\1blocks.\2.attention.",
    r"^decoder_pos_embed_learned$": "decoder_positions",
    r"^mlm_layer\.bias$": "head.bias",
    r"^mlm_layer\.fc\.": "head.fc.",
    r"^mlm_layer\.ln\.": "head.norm.",
}
UNUSED = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "token_emb.position_ids"}
UNUSED_MODULES = ("patch_embed.", "decoder_pred.", "vqgan.")
"""Stand in every file: what its class inherits and never calls, and the tokenizer, which is imported by itself."""
CLASS_SLOTS = 1000


def mage(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """MAGE after pre-training, without classes.

    Args:
        config: the constructor's arguments, and what the original code takes from elsewhere: `codebook_size` from the tokenizer, `norm_eps`
            from the norm that it is given, `fake_class_label` (the word in the class token's place, the codes counted).

    The table of positions has 257 rows for every length, and the head's bias an entry for every word; those that nothing reads go.
    """
    if any(name.startswith(("head.", "fc_norm.")) for name in state_dict):
        raise UserError("head.* or fc_norm.* shows a MAGE classifier, which cannot generate; take the file of pre-training")
    codebook_size = config.get("codebook_size", 1024)
    module = MAGE(
        codebook_size=codebook_size,
        grid_size=config.get("img_size", 256) // config.get("patch_size", 16),
        hidden_dim=config.get("embed_dim", 1024),
        depth=config.get("depth", 24),
        num_heads=config.get("num_heads", 16),
        decoder_dim=config.get("decoder_embed_dim", 512),
        decoder_depth=config.get("decoder_depth", 8),
        decoder_num_heads=config.get("decoder_num_heads", 16),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        norm_eps=config.get("norm_eps", 1e-5),
        num_classes=1,
        class_dropout=1.0,
        class_slots=CLASS_SLOTS,
        null_slot=config.get("fake_class_label", codebook_size + 76) - codebook_size,
    )
    state = renamed({name: x for name, x in state_dict.items() if not name.startswith(UNUSED_MODULES)}, NAMES, UNUSED)
    if "positions" in state:
        state["positions"] = state["positions"][: 1 + module.num_tokens]
    if "decoder_positions" in state:
        state["decoder_positions"] = state["decoder_positions"].squeeze(0)
    if "head.bias" in state:
        state["head.bias"] = state["head.bias"].flatten()[:codebook_size]
    return module, state
