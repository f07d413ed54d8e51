"""Official MaskGIT weights to ours: the original, ImageBert and UViTBert of TiTok, Halton-MaskGIT.

Codes come first in every vocabulary. Behind them ours have the unknown token and then the classes, the null one last, in two tables.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genvision.convert.dit import PARALLEL
from genvision.convert.generators import renamed
from genvision.errors import UserError
from genvision.models.maskgit import MaskGIT

BERT_NAMES = {
    r"^model\.embeddings\.position_embeddings\.weight$": "position_embed",
    r"^model\.embeddings\.LayerNorm\.": "embed_norm.",
    r"^model\.encoder\.layer\.(\d+)\.attention\.self\.": r"blocks.\1.attn.",
    r"^model\.encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attn.proj.",
    r"^model\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.": r"blocks.\1.norm1.",
    r"^model\.encoder\.layer\.(\d+)\.intermediate\.dense\.": r"blocks.\1.mlp.fc1.",
    r"^model\.encoder\.layer\.(\d+)\.output\.dense\.": r"blocks.\1.mlp.fc2.",
    r"^model\.encoder\.layer\.(\d+)\.output\.LayerNorm\.": r"blocks.\1.norm2.",
    r"^model\.lm_head\.": "to_logits.",
}
WORDS, TOKEN_TYPES = "model.embeddings.word_embeddings.weight", "model.embeddings.token_type_embeddings.weight"
JAX_NAMES = {
    r"^Embed_0\.position_embeddings\.weight$": "position_embed",
    r"^Embed_0\.embeddings_ln\.": "embed_norm.",
    r"^TransformerLayer_(\d+)\.Attention_0\.self_attention\.out\.": r"blocks.\1.attn.proj.",
    r"^TransformerLayer_(\d+)\.Attention_0\.self_attention\.": r"blocks.\1.attn.",
    r"^TransformerLayer_(\d+)\.Attention_0\.attention_output_ln\.": r"blocks.\1.norm1.",
    r"^TransformerLayer_(\d+)\.Mlp_0\.intermediate_output\.": r"blocks.\1.mlp.fc1.",
    r"^TransformerLayer_(\d+)\.Mlp_0\.layer_output\.": r"blocks.\1.mlp.fc2.",
    r"^TransformerLayer_(\d+)\.Mlp_0\.layer_output_ln\.": r"blocks.\1.norm2.",
    r"^MlmLayer_0\.mlm_dense\.": "to_logits.dense.",
    r"^MlmLayer_0\.mlm_ln\.": "to_logits.norm.",
    r"^MlmLayer_0\.mlm_bias\.bias$": "to_logits.bias",
}
HALTON_NAMES = {
    r"^cls_emb\.": "label_embed.table.",
    r"^tok_emb\.": "token_embed.",
    r"^pos_emb\.weight$": "position_embed",
    r"^reg_tokens\.weight$": "registers",
    r"^transformer\.layers\.(\d+)\.mlp\.1\.": r"blocks.\1.modulation.",
    r"^transformer\.layers\.(\d+)\.ln([12])\.": r"blocks.\1.norm\2.",
    r"^transformer\.layers\.(\d+)\.attn\.wo\.": r"blocks.\1.attn.proj.",
    r"^transformer\.layers\.(\d+)\.attn\.": r"blocks.\1.attn.",
    r"^transformer\.layers\.(\d+)\.ff\.w1\.": r"blocks.\1.mlp.gate.",
    r"^transformer\.layers\.(\d+)\.ff\.w3\.": r"blocks.\1.mlp.up.",
    r"^transformer\.layers\.(\d+)\.ff\.w2\.": r"blocks.\1.mlp.down.",
    r"^last_norm\.norm_final\.weight$": "norm.norm.weight",
    r"^last_norm\.norm_final\.bias$": "norm.bias",
    r"^last_norm\.mlp\.1\.": "norm.modulation.",
    r"^head\.bias$": "to_logits.bias",
}
"""Each: the first pattern that matches counts."""


def maskgit_bert(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """ImageBert and UViTBert (bytedance/1d-tokenizer, modeling/maskgit.py).

    Args:
        config: the official configuration (`model.vq_model.codebook_size`, `model.generator`), or that `model` part alone; `class` says
            which of the two networks it is, where tensor names are not to say it.

    Raises:
        UserError: `class` is another one; the row of ImageBert's token types is missing.
    """
    model = config.get("model", config)
    options, codebook_size = model["generator"], model["vq_model"]["codebook_size"]
    state = {PARALLEL.sub("", name): tensor for name, tensor in state_dict.items()}
    kind = config.get("class", "UViTBert" if "pos_embed" in state else "ImageBert")
    if kind not in ("ImageBert", "UViTBert"):
        raise UserError(f"class '{kind}' is unknown; choose ImageBert or UViTBert")
    width, depth = options.get("hidden_size", 768), options.get("num_hidden_layers", 24)
    is_bert = kind == "ImageBert"
    module = MaskGIT(
        codebook_size=codebook_size,
        sequence_length=options.get("image_seq_len", 256),
        hidden_dim=width,
        depth=depth if is_bert else 2 * (depth // 2) + 1,
        num_heads=options.get("num_attention_heads", 16),
        mlp_ratio=options.get("intermediate_size", 3072) / width,
        num_classes=options.get("condition_num_classes", 1000),
        class_dropout=options.get("class_label_dropout", 0.1),
        block="post_norm" if is_bert else "pre_norm",
        mlp="gelu",
        head="linear",
        use_skips=not is_bert,
        use_qk_norm=False,
        use_qkv_bias=is_bert,
        num_registers=0,
        norm_eps=1e-12 if is_bert else 1e-5,
        dropout=options.get("dropout", 0.1) if is_bert else 0.0,  # UViTBert has the options, and uses none
        attention_dropout=options.get("attn_drop", 0.1) if is_bert else 0.0,
    )
    if not is_bert:
        return module, _uvit_state(state, codebook_size, depth // 2)
    state = _split_words(state, WORDS, codebook_size)
    types = state.pop(TOKEN_TYPES, None)
    if types is None and "token_embed.weight" in state:  # else it is another family's file
        raise UserError(f"{TOKEN_TYPES} is missing; fetch the file again")
    state = _packed(renamed(state, BERT_NAMES, ignore={"model.embeddings.position_ids"}), ("query", "key", "value"))
    if types is not None and "position_embed" in state:  # every token is of type 0, so that its row is part of every position
        state["position_embed"] = state["position_embed"] + types[0]
    return module, state


def maskgit_jax(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """MaskGIT (google-research/maskgit, maskgit/nets/maskgit_transformer.py): parameters of flax under paths with slashes.

    Their unknown token is -1, which is the last row of the vocabulary; labels were never dropped.
    """
    codebook_size, num_classes = config.get("codebook_size", 1024), config.get("num_class", 1000)
    if (size := config.get("vocab_size", codebook_size + num_classes + 1)) != codebook_size + num_classes + 1:
        raise UserError(f"vocab_size {size} must be codebook_size {codebook_size} + num_class {num_classes} + 1, the unknown token")
    length, width = config.get("max_position_embeddings", 257) - 1, config.get("hidden_size", 768)
    if (side := round(length**0.5)) ** 2 != length:
        raise UserError(f"max_position_embeddings {length + 1} must be a square, the tokens of an image, + 1, the class")
    module = MaskGIT(
        codebook_size=codebook_size,
        grid_size=side,
        hidden_dim=width,
        depth=config.get("num_hidden_layers", 24),
        num_heads=config.get("num_attention_heads", 16),
        mlp_ratio=config.get("intermediate_size", 3072) / width,
        num_classes=num_classes,
        class_dropout=0.0,
        block="post_norm",
        mlp="gelu_tanh",
        head="mlm",
        use_qk_norm=False,
        use_qkv_bias=True,
        num_registers=0,
        norm_eps=1e-12,
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
    )
    words, state = "Embed_0.word_embeddings.weight", {}
    for path, tensor in state_dict.items():
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", path.removeprefix("params/").replace("/", "."))
        if re.search(r"\.(query|key|value)\.weight$", name):
            tensor = tensor.flatten(1)  # [C, H, D]
        elif name.endswith("self_attention.out.weight"):
            tensor = tensor.flatten(0, -2)  # [H, D, C]
        elif name in (words, "MlmLayer_0.mlm_bias.bias"):
            tensor = torch.cat([tensor[:codebook_size], tensor[-1:], tensor[codebook_size:-1]])
        elif ".self_attention." in name:
            tensor = tensor.flatten()
        state[name] = tensor.T.contiguous() if path.endswith("/kernel") else tensor
    return module, _packed(renamed(_split_words(state, words, codebook_size), JAX_NAMES, set()), ("query", "key", "value"))


def halton_maskgit(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Halton-MaskGIT (valeoai/Halton-MaskGIT, Network/transformer.py); its head is the table of tokens, stored a second time.

    Raises:
        UserError: an option that no released model has; the head is another matrix than the table of tokens.
    """
    width, codebook_size = config.get("hidden_dim", 768), config.get("codebook_size", 16384)
    for name, value in {"proj": 1, "mask_value": codebook_size}.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]}; only {value} is supported")
    module = MaskGIT(
        codebook_size=codebook_size,
        grid_size=config.get("input_size", 16),
        hidden_dim=width,
        depth=config.get("depth", 12),
        num_heads=config.get("heads", 16),
        mlp_ratio=config.get("mlp_dim", 3072) / width,
        mlp_multiple_of=256,
        num_classes=config.get("nclass", 1000),
        class_dropout=0.1,
        block="modulated",
        mlp="swiglu",
        head="tied",
        use_qk_norm=True,
        num_registers=config.get("register", 1),
        norm_eps=1e-5,
        dropout=config.get("dropout", 0.0),
    )
    state = {PARALLEL.sub("", name): tensor for name, tensor in state_dict.items()}
    head, table = state.pop("head.weight", None), state.get("tok_emb.weight")
    if head is not None and table is not None and (head.shape != table.shape or not (head.is_meta or torch.equal(head, table))):
        raise UserError("head.weight differs from tok_emb.weight; one matrix is both here, as in every released model")
    return module, _packed(renamed(state, HALTON_NAMES, set()), ("wq", "wk", "wv"))


def _uvit_state(state: Mapping[str, Tensor], codebook_size: int, half: int) -> dict[str, Tensor]:
    """UViTBert's tensors under our names: blocks count through, the linear layers of the skips stand beside them."""
    result = {}
    for name, tensor in _split_words(state, "embeddings.weight", codebook_size).items():
        name = re.sub(r"^out_blocks\.(\d+)\.skip_linear\.", r"skip_layers.\1.", name)
        name = re.sub(r"^in_blocks\.", "blocks.", name)
        name = re.sub(r"^mid_block\.", f"blocks.{half}.", name)
        name = re.sub(r"^out_blocks\.(\d+)\.", lambda match: f"blocks.{half + 1 + int(match[1])}.", name)
        name = re.sub(r"^lm_head\.", "to_logits.", name)
        result["position_embed" if name == "pos_embed" else name] = tensor.squeeze(0) if name == "pos_embed" else tensor
    return result


def _split_words(state: Mapping[str, Tensor], name: str, codebook_size: int) -> dict[str, Tensor]:
    """The vocabulary `name`, where there is one, as two tables: codes and the unknown token; classes."""
    result = dict(state)
    if (words := result.pop(name, None)) is not None:
        # copies, so that files can be written of them
        result["token_embed.weight"] = words[: codebook_size + 1].clone()
        result["label_embed.table.weight"] = words[codebook_size + 1 :].clone()
    return result


def _packed(state: Mapping[str, Tensor], parts: tuple[str, str, str]) -> dict[str, Tensor]:
    """Queries, keys and values of a block as one matrix; a block that lacks one of them keeps their names."""
    result = {}
    for name, tensor in state.items():
        found = re.fullmatch(rf"(blocks\.\d+\.attn\.)({'|'.join(parts)})\.(weight|bias)", name)
        names = [f"{found[1]}{part}.{found[3]}" for part in parts] if found else []
        if found is None or not all(part in state for part in names):
            result[name] = tensor
        elif found[2] == parts[0]:
            result[f"{found[1]}qkv.{found[3]}"] = torch.cat([state[part] for part in names])
    return result
